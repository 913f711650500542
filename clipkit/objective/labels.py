"""What is known of a picture beside its captions: the words it is tagged with, and its class."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import full, mean_rows, similarity
from clipkit.registry import term


@term(needs="tag_logits")
def stc(z: Embeddings, *, reduction: Literal["mean", "sum"] = "mean") -> Float[Tensor, ""]:
    """Classification of the tags of each picture. Short-tag classification of HQ-CLIP, arXiv 2507.22431; CatLIP.

        mean_i mean_w ( y_iw log(1 + e^{-x_iw}) + (1 - y_iw) log(1 + e^{x_iw}) )      x `tag_logits`, y `tags`

    Over the V words of the vocabulary and the pictures with at least one of them; of the others nothing is known.
    `reduction: sum` adds up the words, as CatLIP does (arXiv 2404.15653): V times the mean. Logits of 0 give log 2.
    """
    if z.tag_logits is None or z.tags is None:
        raise UserError("stc: needs embeddings.tag_logits and tags; set data.tags and model.heads.tags.vocabulary")
    logits = full(z.tag_logits)
    losses = binary_cross_entropy_with_logits(logits, z.tags.to(logits.dtype), reduction="none")
    rows = losses.sum(1) if reduction == "sum" else losses.mean(1)
    return mean_rows(rows, counted=z.tags.any(1))


@term(needs="label")
def class_similarity(z: Embeddings, *, of: Literal["image", "text", "both"] = "both") -> Float[Tensor, ""]:
    """Embeddings drawn to their class and brought to right angles with the rest. Yang et al., arXiv 2304.03916.

        Σ_(x ∈ v, t) mean_i ( -1/m Σ_{j: y_j = y_i} x_i·x_j  +  | 1/m Σ_{j: y_j ≠ y_i} x_i·x_j | )

    m counts the pairs that have a class, the others take no part; both means are over all m, i included. Classes in one
    point each, at right angles, give on each side minus the mean share of a pair's class. Holds the n × n matrix.
    """
    if z.label is None:
        raise UserError("class_similarity: needs embeddings.label and found none; set data.labels: true")
    known = z.label >= 0
    count = known.sum().clamp(min=1)
    same = (z.label[:, None] == z.label) & known
    total = full(z.image).new_zeros(())
    for side in ("image", "text") if of == "both" else (of,):
        cosines = similarity(getattr(z, side), getattr(z, side))
        drawn = cosines.masked_fill(~same, 0.0).sum(1) / count
        apart = cosines.masked_fill(same | ~known, 0.0).sum(1) / count
        total = total + mean_rows(apart.abs() - drawn, counted=known)
    return total


def by_label(z: Embeddings, otherwise: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Numbers equal for pairs of one class and, without a class, for those whose `otherwise` is equal.

    Raises UserError when nothing is known of classes.
    """
    if z.label is None:
        raise UserError("this needs embeddings.label and found none; set data.labels: true")
    return torch.stack([z.label, otherwise.masked_fill(z.label >= 0, 0)], 1).unique(dim=0, return_inverse=True)[1]
