"""Staying near the teacher."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from clipkit.config import Positive
from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import full
from clipkit.registry import term


@term(needs="teacher")
def distill(z: Embeddings, *, reference_batch: Positive = 256) -> Float[Tensor, ""]:
    """Squared distance of images, captions and negative captions to the teacher's. DeGLA, arXiv 2504.16801.

        reference_batch · mean_i ( ‖v_i - v*_i‖² + ‖t_i - t*_i‖² + Σ_{k valid} ‖n_ik - n*_ik‖² )

    DeGLA sums over its batch of 256; the mean times `reference_batch` keeps its weight right at any batch size.
    """
    teacher = z.frozen_teacher()
    rows = squared_distance(z.image, teacher.image) + squared_distance(z.text, teacher.text)
    if z.negative_text is not None:
        if teacher.negative_text is None:
            raise UserError("distill: the teacher has no negative_text beside the student's; embed the negatives too")
        rows = rows + squared_distance(z.negative_text, teacher.negative_text).masked_fill(~z.negatives[1], 0.0).sum(1)
    return reference_batch * rows.mean()


def squared_distance(x: Float[Tensor, "*n d"], target: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Row by row, in full precision."""
    return (full(x) - full(target)).square().sum(-1)
