"""Pairwise sigmoid: every image-caption pair is its own yes-or-no question."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import Negatives, captions, diagonal
from clipkit.objective.groups import same_group
from clipkit.objective.kernel import mean_rows
from clipkit.registry import term


@term(needs="bias")
def siglip(
    z: Embeddings,
    *,
    positives: Literal["pair", "group"] = "pair",
    negatives: Negatives = "none",
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Sigmoid loss over all image-caption pairs, with learned scale and bias. SigLIP, arXiv 2303.15343.

        mean_i Σ_c log(1 + exp(-y_ic (s v_i·c + b)))     y = +1 for the image's own caption, else -1

    Negative captions of the pair itself (`own`) or of `all` pairs add their terms. With `positives: group` every
    caption of the image's picture (equal group; `data.positives`) is a positive; otherwise those of other pairs are
    left out unless `mask_same_group` is off. Without a bias, b = 0.
    """
    if positives == "group":
        z = z.with_positives()
    logits, keep = captions(z, negatives, mask_same_group and positives == "pair")
    if z.bias is not None:
        logits = logits + z.bias
    positive = diagonal(logits)
    if positives == "group":
        positive = pad(same_group(z), (0, logits.shape[1] - len(z)))
    sign = 2 * positive.to(logits.dtype) - 1
    return mean_rows(-logsigmoid(sign * logits).masked_fill(~keep, 0.0).sum(1))
