"""Staying near the teacher."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pdist, smooth_l1_loss

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import full
from clipkit.registry import term
from clipkit.settings import Positive


@term(needs=("teacher.image?", "teacher.text?", "teacher.negative_text?", "teacher_width"))
def distill(z: Embeddings, *, reference_batch: Positive = 256) -> Float[Tensor, ""]:
    """Squared distance of images, captions and negative captions to the teacher's. DeGLA, arXiv 2504.16801.

        reference_batch · mean_i ( ‖v_i - v*_i‖² + ‖t_i - t*_i‖² + Σ_{k valid} ‖n_ik - n*_ik‖² )

    DeGLA sums over its batch of 256; the mean times `reference_batch` keeps its weight right at any batch size. With
    `teacher.towers` only what that tower encodes is compared: captions alone are ProCLIP's alignment of instances.
    """
    teacher = z.frozen_teacher()
    rows = sum(squared_distance(own, target) for own, target in _sides(z, teacher))
    if z.negative_text is not None and teacher.text is not None:
        if teacher.negative_text is None:
            raise UserError("distill: the teacher has no negative_text beside the student's; embed the negatives too")
        rows = rows + squared_distance(z.negative_text, teacher.negative_text).masked_fill(~z.negatives[1], 0.0).sum(1)
    return reference_batch * torch.as_tensor(rows).mean()


@term(needs=("teacher.image?", "teacher.text?"))
def structure(z: Embeddings, *, smooth: bool = False, reference_batch: Positive = 512) -> Float[Tensor, ""]:
    """Distances among images, and among captions, stay what they are in the teacher. ProCLIP, arXiv 2510.18795.

        R (R - 1) / 2 · mean_{i<j} ( ρ(‖v_i - v_j‖ - ‖v*_i - v*_j‖) + ρ(‖t_i - t_j‖ - ‖t*_i - t*_j‖) )

    R is `reference_batch`, ρ(x) = x² as in the paper, with `smooth` its released code's smooth L1: x² / 2 below 1,
    |x| - ½ above. ProCLIP sums over the pairs of each GPU's 512; the mean times their number keeps its weight right at
    any batch size. A rotation of all embeddings changes nothing, and the teacher's may be of another width.
    """
    differences = [pdist(full(own)) - pdist(full(target)) for own, target in _sides(z, z.frozen_teacher())]
    total = sum((_smooth(x) if smooth else x.square()).sum() for x in differences)
    pairs = len(z) * (len(z) - 1) // 2
    return reference_batch * (reference_batch - 1) / 2 * torch.as_tensor(total) / max(pairs, 1)


def _smooth(x: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    return smooth_l1_loss(x, torch.zeros_like(x), reduction="none")


def _sides(z: Embeddings, teacher: Embeddings) -> list[tuple[Float[Tensor, "n d"], Float[Tensor, "n e"]]]:
    """Images, then captions, each with the teacher's; only those that the teacher has."""
    both = [(z.image, teacher.image), (z.text, teacher.text)]
    return [(own, target) for own, target in both if target is not None]


def squared_distance(x: Float[Tensor, "*n d"], target: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Row by row, in full precision."""
    return (full(x) - full(target)).square().sum(-1)
