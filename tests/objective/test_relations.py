"""What the documentation says of terms that coincide: in value and in gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clipkit.methods import RELATIONS, Side
from clipkit.model.embeddings import Embeddings

from .cases import leaves, ragged, run

CONDITIONS = {
    "": {},
    "where no picture comes up twice": {"group": torch.arange(8)},
    "without negatives": {"negative_text": None, "valid": None, "negative_image": None, "negative_image_valid": None},
}


@pytest.mark.parametrize(("left", "right", "when"), RELATIONS, ids=[f"{a[0]} {b[0]} {w}" for a, b, w in RELATIONS])
def test_it_holds(left: Side, right: Side, when: str):
    z = replace(ragged(), positive_text=None, positive_valid=None, **CONDITIONS[when])
    value, gradients = _gradients(left, z)
    same, theirs = _gradients(right, z)
    torch.testing.assert_close(value, same, rtol=1e-10, atol=1e-12)
    for gradient, other in zip(gradients, theirs):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-12)


def _gradients(side: Side, z: Embeddings) -> tuple[torch.Tensor, list[torch.Tensor]]:
    name, settings = side
    assert isinstance(z.scale, torch.Tensor)
    fresh = replace(z, image=z.image.clone(), text=z.text.clone(), scale=z.scale.clone())
    tables = leaves(fresh)
    value = run(name, fresh, **settings)
    return value.detach(), [
        torch.zeros_like(table) if gradient is None else gradient
        for table, gradient in zip(tables, torch.autograd.grad(value, tables, allow_unused=True))
    ]
