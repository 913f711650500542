"""AMCL: what a pair's temperature does, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clipkit.errors import UserError
from tests.objective.cases import orthonormal, ragged, run


def test_one_temperature_for_all_is_the_difference_of_means():
    """No network, no regulariser: the others' mean cosine less the pair's, at (least + most) / 2."""
    z = ragged()
    assert z.image_aspects is not None and z.text_aspects is not None
    for x in (z.image_aspects, z.text_aspects):
        x[:, :, 1] = 0.0
    cosines = torch.einsum("iha,jha->hij", z.image_aspects[:, :, 0], z.text_aspects[:, :, 0])
    away = 1 - torch.eye(8, dtype=torch.float64)
    means = ((cosines * away).sum(1) + (cosines * away).sum(2)) / 7 / 2
    expected = (means - cosines.diagonal(dim1=1, dim2=2)).mean(1).sum() * 2 / (0.1 + 2.0)
    value = run("amcl", z, beta=0.0, least=0.1, mask_same_group=False)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_a_pair_alike_to_the_network_is_cooler_and_weighs_more():
    aspects = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    aspects[0, 0, 0, 0] = aspects[1, 0, 0, 1] = 1.0
    aspects[:, 0, 1] = 3 * aspects[:, 0, 0]
    values = []
    for factor in (1.0, 0.0, -1.0):
        other = aspects.clone()
        other[:, 0, 1] *= factor
        values.append(run("amcl", replace(orthonormal(2), image_aspects=aspects, text_aspects=other), beta=0.0).item())
    assert values == sorted(values) and values[0] < -100 < values[1] == pytest.approx(-1, abs=1e-4)


def test_what_is_refused():
    z = ragged()
    with pytest.raises(UserError, match=r"amcl: needs embeddings\.image_aspects and found none; set model\.heads"):
        run("amcl", replace(z, image_aspects=None))
    with pytest.raises(UserError, match=r"amcl\.most: should be above least, 2\.0; got 2\.0"):
        run("amcl", z, least=2.0)
