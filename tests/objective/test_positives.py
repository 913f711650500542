"""Further captions of a picture equal pairs of their own with the same picture, in value and gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clipkit.model.embeddings import Embeddings
from clipkit.objective import TERMS

SETTINGS = {
    "one_to_k": {},
    "tcl": {"log_k1": 3.0, "negatives": "own"},
    "siglip": {"positives": "group", "negatives": "own"},
}


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, 8, dtype=torch.float64), dim=-1).requires_grad_()


@pytest.fixture
def z() -> Embeddings:
    """Five pairs, the first two of one picture, with up to three further captions and two negatives."""
    torch.manual_seed(0)
    return Embeddings(
        unit(5), unit(5), positive_text=unit(5, 3), negative_text=unit(5, 2),
        positive_valid=torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0]]).bool(),
        valid=torch.rand(5, 2) < 0.7, id=torch.arange(5), group=torch.tensor([7, 7, 2, 3, 4]), scale=5.0, bias=-2.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_positives_are_pairs_of_their_own(z: Embeddings, name: str) -> None:
    rows = [(n, p) for n in range(5) for p in range(3) if z.positive_valid is not None and z.positive_valid[n, p]]
    assert z.positive_text is not None and z.negative_text is not None and z.valid is not None
    table, m = z.positive_text, len(rows)
    by_hand = Embeddings(
        torch.cat([z.image, torch.stack([z.image[n] for n, _ in rows])]),
        torch.cat([z.text, torch.stack([table[n, p] for n, p in rows])]),
        negative_text=torch.cat([z.negative_text, torch.zeros(m, 2, 8, dtype=torch.float64)]),
        valid=torch.cat([z.valid, torch.zeros(m, 2, dtype=torch.bool)]),
        group=torch.cat([z.group, torch.tensor([int(z.group[n]) for n, _ in rows])]),
        scale=5.0, bias=-2.0,
    )  # fmt: skip
    inputs = [z.image, z.text, z.positive_text, z.negative_text]
    found, expected = TERMS[name](z, **SETTINGS[name]), TERMS[name](by_hand, **SETTINGS[name])
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    for a, b in zip(*(torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (found, expected))):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    without = TERMS[name](replace(z, positive_text=None, positive_valid=None), **SETTINGS[name])
    assert without.item() != pytest.approx(found.item(), abs=1e-3)


def test_the_teacher_grows_alike(z: Embeddings) -> None:
    more = replace(z, teacher=replace(z)).with_positives()
    assert more.teacher is not None and torch.equal(more.teacher.text, more.text) and len(more) == 5 + 7
    assert more.negative_kind is None and not more.negatives[1][5:].any()
