"""Views of one thing: any number of them, ones that are missing, and soft sorting."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import exp, inf, log, log1p

import pytest
import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.sorting import upper_share
from tests.objective import oracle
from tests.objective.cases import leaves, orthonormal, ragged, run, unit

B, S = 6, 7.0


def alike(views: int) -> Embeddings:
    """Orthonormal instances whose views, beside picture and caption, are equal."""
    z = orthonormal(B, scale=S)
    return replace(z, view_image=z.image[:, None].expand(-1, views, -1))


@pytest.mark.parametrize("views", [1, 2, 4])
def test_closed_forms_of_many_views(views: int):
    z, n = alike(views), views + 2
    assert run("mv_infonce", z).item() == pytest.approx(log1p((B - 1) * exp(-S)), abs=1e-11)
    expected = n * log(B - 1) - S - log(n * (n - 1))
    assert run("mv_dhel", z).item() == pytest.approx(expected, abs=1e-11)
    below = views * exp(S) + (B - 1) * (views + 1)
    assert run("tcl_views", z, scale=S, log_k1=-inf).item() == pytest.approx(log(below) - S, abs=1e-11)


@pytest.mark.parametrize("name", ["mv_infonce", "mv_dhel"])
def test_further_captions_are_views_like_further_pictures(name: str):
    z = ragged()
    assert z.view_image is not None
    texts = replace(z, view_image=None, positive_text=z.view_image)
    assert run(name, texts).item() == pytest.approx(run(name, z).item(), abs=1e-12)


@pytest.mark.parametrize("name", ["mv_infonce", "mv_dhel"])
def test_a_view_that_an_instance_lacks_is_not_there(name: str):
    """Whatever stands in its place; and where nobody has it, the views are two."""
    g = torch.Generator().manual_seed(3)
    z = replace(ragged(), view_image=None, positive_valid=torch.rand(8, 2, generator=g) < 0.5)
    table, other = unit(g, 8, 2, 6), unit(g, 8, 2, 6)
    assert z.positive_valid is not None
    other = torch.where(z.positive_valid[..., None], table, other).requires_grad_()
    got = run(name, replace(z, positive_text=other))
    assert got.item() == pytest.approx(run(name, replace(z, positive_text=table)).item(), abs=1e-12)
    (slope,) = torch.autograd.grad(got, other)
    assert slope.isfinite().all() and slope[z.positive_valid].any() and not slope[~z.positive_valid].any()
    none = replace(z, positive_text=table, positive_valid=torch.zeros_like(z.positive_valid))
    pairs = replace(z, positive_valid=None)
    assert run(name, none).item() == pytest.approx(run(name, pairs).item(), abs=1e-12)


def test_views_are_alike():
    """Which view comes first makes no difference to those that compare pictures alone."""
    z = ragged()
    assert z.view_image is not None
    turned = replace(z, image=z.view_image[:, 1], view_image=torch.stack([z.image, z.view_image[:, 0]], 1))
    for name in ("tcl_views", "groco"):
        assert run(name, turned).item() == pytest.approx(run(name, z).item(), abs=1e-12)
        with pytest.raises(UserError, match=f"{name}: needs embeddings.view_image and found none; set data.views"):
            run(name, replace(z, view_image=None))


# sorting


@pytest.mark.parametrize("size", range(2, 9))
def test_upper_shares_are_those_of_the_loops(size: int):
    g = torch.Generator().manual_seed(size)
    values = torch.randn(5, size, generator=g, dtype=torch.float64)
    for count, missing in itertools.product(range(1, size + 1), (0, 1, 2)):
        there = torch.arange(size + missing).expand(5, -1) >= missing
        padded = torch.cat([torch.zeros(5, missing, dtype=torch.float64), values], 1)
        got = upper_share(padded, there, count, 3.0)[:, missing:]
        for row, expected in zip(got, values.tolist()):
            shares = oracle.soft_sort(expected, 3.0, missing)
            assert row.tolist() == pytest.approx([sum(share[-count:]) for share in shares], abs=1e-12)


def test_steep_sorting_is_sorting():
    values = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = upper_share(values, torch.ones(20, 7, dtype=torch.bool), 3, 1e9)
    above = torch.zeros_like(values).scatter(1, values.topk(3, 1).indices, 1.0)
    torch.testing.assert_close(got, above, rtol=0, atol=1e-4)


def test_groco_falls_to_nothing_where_views_stand_out():
    z = alike(2)
    values = [run("groco", z, steepness=steepness).item() for steepness in (1.0, 30.0, 1e5)]
    assert values == sorted(values, reverse=True) and values[0] > 0.3 and values[-1] < 1e-4
    wrong = replace(z, image=z.image.roll(1, 0))
    assert run("groco", wrong, steepness=1e5) > 0.3


def test_only_the_anchor_of_groco_learns():
    """One picture moved alone: its slope is that of its own rows, not that of those it is a rival in."""
    z = ragged()
    (image, *_) = leaves(z)
    (slope,) = torch.autograd.grad(run("groco", z, top=3), image)
    one = image.detach()[:1].clone().requires_grad_()

    def own_row(anchor: Tensor) -> Tensor:
        assert z.view_image is not None
        cosines = anchor @ image.detach().T
        seen = (z.group != z.group[0]).nonzero()[:, 0]
        values = torch.cat(
            [cosines[:, seen].sort(1).values[:, -3:], (anchor @ z.view_image[0].detach().T).sort(1)[0]], 1
        )
        above = upper_share(values, torch.ones(1, 5, dtype=torch.bool), 2, 1.0)
        return -torch.cat([1 - above[:, :3], above[:, 3:]], 1).log().mean() / 24

    torch.testing.assert_close(slope[:1], torch.autograd.grad(own_row(one), one)[0], rtol=0, atol=1e-12)
