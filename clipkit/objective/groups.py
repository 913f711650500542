"""Several positives: all captions of a picture belong to it, and all its crops to each of them."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import Negatives, both_ways, captions, diagonal, visible
from clipkit.objective.kernel import contrast_rows, log_mask, mean_rows, similarity
from clipkit.objective.labels import by_label
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
    positives: Literal["group", "label"] = "group",
) -> Float[Tensor, ""]:
    """Contrast with several positives, whose pull and push can be tuned. TCL, arXiv 2305.10675.

        mean_i -1/|P| Σ_{p∈P} ( s c_ip - log D_i )      c cosines, P the others of the anchor's group or class
        D_i = Σ_P e^{s c_ip} + k1 Σ_P e^{-c_ip} + k2 Σ_N e^{s c_in}

    The mean of images against captions and captions against images; `within` is the paper's form, all 2n embeddings
    against one another. `log_k1: -.inf` is SupCon (arXiv 2004.11362). Negative captions (`own` or `all`) are in N of
    the images, with `within` of the captions too. The paper's k1 = 5000 is for s = 10 and does nothing at CLIP's 100:
    take about c (s + 1), 30 for c = 0.3. Further captions (`data.positives`) are pairs of their own. With
    `positives: label` (the paper's supervised form) all of an anchor's class are in P; pairs without a class keep to
    their group.
    """
    z = z.with_positives()
    if positives == "label":
        z = replace(z, group=by_label(z, z.group))

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


@term(needs="positive_text")
def paraphrase(z: Embeddings, *, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """Each caption against its paraphrase, and that against the next. ParaCLIP's text contrasts, arXiv 2402.15120.

        Σ_p ½ [ mean_i CE(s c_ip · C_{p+1}, i)  +  mean_i CE(s c_i,p+1 · C_p, i) ]

    c_i0 is the caption t_i, c_ip its p-th positive. In the paper T'' is the caption, T' its first positive and T its
    second: `data.positive_kinds` says in which order they come. A pair without both texts is neither anchor nor rival.
    """
    if z.positive_text is None or z.positive_valid is None:
        raise UserError("paraphrase: needs embeddings.positive_text and found none; set data.positives")
    chain = [z.text, *z.positive_text.unbind(1)]
    exist = [torch.ones_like(z.positive_valid[:, 0]), *z.positive_valid.unbind(1)]
    seen = visible(z, mask_same_group)

    def link(p: int) -> Tensor:
        both = exist[p] & exist[p + 1]
        logits = z.scale * similarity(chain[p], chain[p + 1])
        keep = log_mask(seen & both)
        rows = [contrast_rows(side, diagonal(side), log_weights=keep) for side in (logits, logits.T)]
        return (mean_rows(rows[0], counted=both) + mean_rows(rows[1], counted=both)) / 2

    return torch.stack([link(p) for p in range(len(chain) - 1)]).sum()


def same_group(z: Embeddings) -> Bool[Tensor, "n n"]:
    """Which pairs show the same picture, themselves included."""
    return z.group[:, None] == z.group


def _shares(positive: Bool[Tensor, "a c"], dtype: torch.dtype) -> Float[Tensor, "a c"]:
    return positive.to(dtype) / positive.sum(1, keepdim=True)
