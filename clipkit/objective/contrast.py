"""Contrast over the whole batch: CLIP and its hard-negative forms."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import mean_rows, similarity
from clipkit.objective.labels import by_label
from clipkit.objective.tables import Block, contrast_tables, pairs, rivals
from clipkit.registry import term

Negatives = Literal["all", "own", "none"]


@term()
def infonce(
    z: Embeddings, *, negatives: Negatives = "all", mask_same_group: bool = True, mask_same_label: bool = False
) -> Float[Tensor, ""]:
    """Images against captions and captions against images, hard-negative captions in the image rows. CLIP, NegCLIP.

        ½ [ mean_i CE(s v_i · [T; N], i) + mean_j CE(s t_j · V, j) ]

    N holds the negative captions of `all` pairs (NegCLIP and DeGLA as released), of the pair itself (`own`; DeGLA
    eq. 4) or of `none` (CLIP); they are never anchors. A caption of the anchor's own picture (equal group) is not its
    negative unless `mask_same_group` is off, nor with `mask_same_label` one of its class. CLIP arXiv 2103.00020,
    NegCLIP arXiv 2210.01936, DeGLA arXiv 2504.16801.
    """
    table, valid = z.negatives
    group = z.group if mask_same_group else None
    if mask_same_label:
        group = by_label(z, z.group if mask_same_group else torch.arange(len(z), device=z.image.device))
    blocks = [Block(z.text, pairs(len(z), z.image.device, group))]
    own = None
    if negatives == "all":
        blocks.append(Block(table.flatten(0, 1), rivals(z.negative_log_weight.flatten())))
    elif negatives == "own":
        weighted = z.scale * similarity(z.image[:, None], table)[:, 0] + z.negative_log_weight
        own = weighted.masked_fill(~valid, -torch.inf)
    image_rows, text_rows = contrast_tables(
        z.image, blocks, scale=z.scale, both=True, extra=own, replicated=z.replicated
    )
    return both_ways([image_rows, text_rows])


def captions(
    z: Embeddings, negatives: Negatives, mask_same_group: bool
) -> tuple[Float[Tensor, "n c"], Bool[Tensor, "n c"]]:
    """Each image's scaled logits against the n captions, then its negative captions, and which of them it may see.

    A negative caption says something false of its own picture, so one of the same group stays a negative.
    """
    keep = visible(z, mask_same_group)
    table, valid = z.negatives
    if negatives == "none":
        table, valid = table[:, :0], valid[:, :0]
    if negatives == "all":
        hard, valid = similarity(z.image, table.flatten(0, 1)), valid.flatten().expand(len(z), -1)
    else:
        hard = similarity(z.image[:, None], table)[:, 0]
    return z.scale * torch.cat([similarity(z.image, z.text), hard], 1), torch.cat([keep, valid], 1)


def visible(z: Embeddings, mask_same_group: bool) -> Bool[Tensor, "n n"]:
    """Which pairs' captions and pictures a pair is compared with: its own, and all but those of its own picture."""
    pair = torch.eye(len(z), dtype=torch.bool, device=z.image.device)
    return pair | (z.group[:, None] != z.group) if mask_same_group else torch.ones_like(pair)


Side = tuple[Float[Tensor, "n c"], Bool[Tensor, "n c"]]
OtherSide = tuple[Float[Tensor, "n n"], Bool[Tensor, "n n"]]


def sides(z: Embeddings, mask_same_group: bool, negatives: Negatives = "none") -> tuple[Side, OtherSide]:
    """Scaled logits and who is seen, once with images as rows (as `captions`), once with captions as rows.

    Each row's own pair is on the diagonal.
    """
    n = len(z)
    logits, keep = captions(z, negatives, mask_same_group)
    return (logits, keep), (logits[:, :n].T, keep[:, :n].T)


def diagonal(like: Shaped[Tensor, "n c"]) -> Bool[Tensor, "n c"]:
    """Marks each row's own pair in a table of this shape."""
    return torch.eye(*like.shape, dtype=torch.bool, device=like.device)


def both_ways(rows: list[Float[Tensor, " n"]]) -> Float[Tensor, ""]:
    """Half the sum of the two sides' means."""
    images, captions = rows
    return (mean_rows(images) + mean_rows(captions)) / 2
