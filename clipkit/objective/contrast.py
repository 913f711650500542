"""Contrast over the whole batch: CLIP and its hard-negative forms."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import contrast_rows, log_mask, mean_rows, similarity
from clipkit.registry import term

Negatives = Literal["all", "own", "none"]


@term()
def infonce(z: Embeddings, *, negatives: Negatives = "all", mask_same_group: bool = True) -> Float[Tensor, ""]:
    """Images against captions and captions against images, hard-negative captions in the image rows. CLIP, NegCLIP.

        ½ [ mean_i CE(s v_i · [T; N], i) + mean_j CE(s t_j · V, j) ]

    N holds the negative captions of `all` pairs (NegCLIP and DeGLA as released), of the pair itself (`own`; DeGLA
    eq. 4) or of `none` (CLIP); they are never anchors. A caption of the anchor's own picture (equal group) is not its
    negative unless `mask_same_group` is off. CLIP arXiv 2103.00020, NegCLIP arXiv 2210.01936, DeGLA arXiv 2504.16801.
    """
    n = len(z)
    logits, keep = captions(z, negatives, mask_same_group)
    pair = torch.eye(n, logits.shape[1], dtype=torch.bool, device=logits.device)
    image_rows = contrast_rows(logits, pair, log_weights=log_mask(keep))
    text_rows = contrast_rows(logits[:, :n].T, pair[:, :n], log_weights=log_mask(keep[:, :n].T))
    return (mean_rows(image_rows) + mean_rows(text_rows)) / 2


def captions(
    z: Embeddings, negatives: Negatives, mask_same_group: bool
) -> tuple[Float[Tensor, "n c"], Bool[Tensor, "n c"]]:
    """Each image's scaled logits against the n captions, then its negative captions, and which of them it may see.

    A negative caption says something false of its own picture, so one of the same group stays a negative.
    """
    keep = torch.eye(len(z), dtype=torch.bool, device=z.image.device)
    keep = keep | (z.group[:, None] != z.group) if mask_same_group else torch.ones_like(keep)
    table, valid = z.negatives
    if negatives == "none":
        table, valid = table[:, :0], valid[:, :0]
    if negatives == "all":
        hard, valid = similarity(z.image, table.flatten(0, 1)), valid.flatten().expand(len(z), -1)
    else:
        hard = similarity(z.image[:, None], table)[:, 0]
    return z.scale * torch.cat([similarity(z.image, z.text), hard], 1), torch.cat([keep, valid], 1)
