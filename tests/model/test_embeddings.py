"""`Embeddings`: defaults, shapes that do not fit, the teacher cut off. (Ranks: tests/objective/test_world.py.)"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings

N, K, D = 3, 2, 4


def some(**tables: torch.Tensor) -> Embeddings:
    return Embeddings(image=torch.ones(N, D), text=torch.ones(N, D), **tables)  # type: ignore[arg-type]


def test_defaults():
    z = some()
    assert len(z) == N and z.id.tolist() == z.group.tolist() == [0, 1, 2]
    assert z.valid is None and z.scale == 1.0 and z.bias is None and z.teacher is None
    table, valid = z.negatives
    assert table.shape == (N, 0, D) and valid.shape == (N, 0) and valid.dtype == torch.bool


def test_all_negatives_are_valid_unless_said_otherwise():
    z = some(negative_text=torch.ones(N, K, D))
    assert z.valid is not None and z.valid.all() and z.valid.shape == (N, K) and z.valid.dtype == torch.bool
    kept = torch.tensor([[True, False]] * N)
    assert some(negative_text=torch.ones(N, K, D), valid=kept).negatives[1] is kept


def test_a_sample_is_its_own_group_unless_said_otherwise():
    assert some(id=torch.tensor([7, 7, 9])).group.tolist() == [7, 7, 9]
    assert some(group=torch.tensor([5, 5, 5])).id.tolist() == [0, 1, 2]


def test_alone_the_world_is_oneself():
    z = some()
    assert z.world() is z


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"negative_text": torch.ones(N, D)}, r"negative_text: should be \[n k d\] with n=3, d=4, got shape \(3, 4\)"),
        ({"negative_text": torch.ones(N, K, D + 1)}, r"negative_text: should be \[n k d\]"),
        ({"negative_image": torch.ones(K, N, D)}, r"negative_image: should be \[n j d\]"),
        ({"negative_text": torch.ones(N, K, D), "valid": torch.ones(N, K + 1).bool()}, r"valid: should be \[n k\]"),
        ({"group": torch.zeros(N + 1).long()}, r"group: should be \[n\]"),
    ],
)
def test_shapes_that_do_not_belong_together(tables: dict, message: str):
    with pytest.raises(UserError, match=message):
        some(**tables)
    with pytest.raises(UserError, match=r"text: should be \[n d\]"):
        Embeddings(torch.ones(N, D), torch.ones(N + 1, D))


def test_the_frozen_teacher_is_cut_off():
    negatives = torch.ones(N, K, D, requires_grad=True)
    z = replace(some(), teacher=some(negative_text=negatives))
    frozen = z.frozen_teacher()
    assert frozen.negative_text is not None and not frozen.negative_text.requires_grad
    assert torch.equal(frozen.negative_text, negatives)
    with pytest.raises(UserError, match="teacher"):
        some().frozen_teacher()
