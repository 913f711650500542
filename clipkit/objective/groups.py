"""Several positives: all captions of a picture belong to it, and all its crops to each of them."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import Negatives, both_ways, captions, diagonal
from clipkit.objective.kernel import contrast_rows, log_mask, similarity
from clipkit.registry import term

LOG_5000 = log(5000)
LogFactor = Annotated[float, Field(le=1000.0)]


@term()
def tcl(
    z: Embeddings,
    *,
    log_k1: LogFactor = LOG_5000,
    log_k2: LogFactor = 0.0,
    within: bool = False,
    negatives: Negatives = "none",
) -> Float[Tensor, ""]:
    """Contrast with several positives, whose pull and push can be tuned. TCL, arXiv 2305.10675.

        mean_i -1/|P| Σ_{p∈P} ( s c_ip - log D_i )      c cosines, P the others of the anchor's group
        D_i = Σ_P e^{s c_ip} + k1 Σ_P e^{-c_ip} + k2 Σ_N e^{s c_in}

    The mean of images against captions and captions against images; `within` is the paper's form, all 2n embeddings
    against one another. `log_k1: -.inf` is SupCon (arXiv 2004.11362). Negative captions (`own` or `all`) are in N of
    the images, with `within` of the captions too. The paper's k1 = 5000 is for s = 10 and does nothing at CLIP's 100:
    take about c (s + 1), 30 for c = 0.3. Further captions (`data.positives`) are pairs of their own.
    """
    z = z.with_positives()

    def rows(anchor: Tensor, other: Tensor, negatives: Negatives) -> Tensor:
        cosines, keep = captions(replace(z, image=anchor, text=other, scale=1.0), negatives, mask_same_group=False)
        positive = pad(same_group(z), (0, cosines.shape[1] - len(z)))
        if within:
            apart = ~diagonal(same_group(z))
            cosines = torch.cat([cosines, similarity(anchor, anchor)], 1)
            positive, keep = torch.cat([positive, same_group(z) & apart], 1), torch.cat([keep, apart], 1)
        return tuned_rows(cosines, positive, keep, z.scale, log_k1, log_k2)

    return both_ways([rows(z.image, z.text, negatives), rows(z.text, z.image, negatives if within else "none")])


def tuned_rows(
    cosines: Float[Tensor, "a c"],
    positive: Bool[Tensor, "a c"],
    keep: Bool[Tensor, "a c"],
    scale: Tensor | float,
    log_k1: float,
    log_k2: float,
) -> Float[Tensor, " a"]:
    """Rows of `tcl`: its positives, and what else is kept as its negatives."""
    weights = log_mask(keep).to(cosines.dtype).masked_fill(keep & ~positive, log_k2)
    pulls = (log_k1 - cosines).masked_fill(~positive, -torch.inf)
    return contrast_rows(scale * cosines, _shares(positive, cosines.dtype), log_weights=weights, extra=pulls)


@term()
def one_to_k(z: Embeddings) -> Float[Tensor, ""]:
    """A picture to all its captions alike, each caption to its picture. 1-to-K of CCRK, arXiv 2406.18254.

        ½ [ mean_i 1/|P_i| Σ_{p∈P_i} CE(s v_i · T, p)  +  mean_j CE(s t_j · V, j) ]      P_i the captions of i's group

    Rows of one group share the weight of one picture in the denominators of the captions, so that every picture counts
    once. The released code weighs the second half 1/K. With K captions the first half cannot fall below log K.
    Further captions (`data.positives`) are pairs of their own.
    """
    z = z.with_positives()
    same = same_group(z)
    logits = z.scale * similarity(z.image, z.text)
    images = contrast_rows(logits, _shares(same, logits.dtype))
    once = -same.sum(0, keepdim=True).to(logits.dtype).log()
    texts = contrast_rows(logits.T, diagonal(logits), log_weights=once)
    return both_ways([images, texts])


def same_group(z: Embeddings) -> Bool[Tensor, "n n"]:
    """Which pairs show the same picture, themselves included."""
    return z.group[:, None] == z.group


def _shares(positive: Bool[Tensor, "a c"], dtype: torch.dtype) -> Float[Tensor, "a c"]:
    return positive.to(dtype) / positive.sum(1, keepdim=True)
