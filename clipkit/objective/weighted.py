"""The contrast over the batch with other weights: on the pair itself, on its rivals, or on whole rows."""

from __future__ import annotations

from math import log
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import Negatives, both_ways, diagonal, sides, visible
from clipkit.objective.kernel import contrast_rows, full, log_mask, similarity
from clipkit.registry import term

NonNegative = Annotated[float, Field(ge=0.0)]


@term()
def dcl(
    z: Embeddings,
    *,
    sigma: Annotated[float, Field(gt=0.0)] | None = None,
    within: bool = False,
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Decoupled contrast: a pair is not in its own denominator. DCL and DCLW, arXiv 2110.06848.

        ½ Σ_(both ways) mean_i ( -w_i s v_i·t_i + log Σ_{j≠i} e^{s v_i·t_j} )

    w_i = 1; with `sigma` (0.5 in the paper) DCLW: w_i = 2 - n softmax_i(v_i·t_i / sigma), with gradient, 1 on average.
    `within` adds images to the rivals of an image and captions to those of a caption, as the paper has it for two views
    of one kind. A pair without rivals adds nothing. The value may be negative.
    """
    weights = None if sigma is None else 2 - len(z) * (_pairs(z) / sigma).softmax(0)

    def rows(table: Tensor, logits: Tensor, keep: Tensor) -> Tensor:
        if within:
            logits = torch.cat([logits, z.scale * similarity(table, table)], 1)
            keep = torch.cat([keep, keep & ~diagonal(keep)], 1)
        pair = diagonal(logits)
        decoupled = contrast_rows(logits, pair, log_weights=log_mask(keep), log_alpha=-torch.inf)
        if weights is None:
            return decoupled
        return decoupled + ((1 - weights) * logits.diagonal()).masked_fill(~(keep & ~pair).any(1), 0.0)

    return both_ways([rows(table, *side) for table, side in zip((z.image, z.text), sides(z, mask_same_group))])


@term()
def hn_nce(
    z: Embeddings,
    *,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 0.5,
    detach_weights: bool = False,
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Contrast in which harder rivals weigh more. HN-NCE of DiHT, arXiv 2301.02280.

        ½ Σ_(both ways) mean_i -log( e^{l_ii} / (alpha e^{l_ii} + Σ_{j≠i} w_ij e^{l_ij}) )      l = s v·t
        w_ij = m_i e^{beta l_ij} / Σ_{k≠i} e^{beta l_ik}      over the m_i rivals of i, so that they weigh 1 on average

    alpha 1 with beta 0 is `infonce`, alpha 0 with beta 0 `dcl`. The weights send gradient unless `detach_weights`.
    """
    log_alpha = log(alpha) if alpha else -torch.inf

    def rows(logits: Tensor, keep: Tensor) -> Tensor:
        pair = diagonal(logits)
        hardness = _log_hardness(beta * logits, keep & ~pair)
        hardness = hardness.detach() if detach_weights else hardness
        return contrast_rows(logits, pair, log_weights=hardness.masked_fill(pair, 0.0), log_alpha=log_alpha)

    return both_ways([rows(*side) for side in sides(z, mask_same_group)])


def _log_hardness(logits: Float[Tensor, "n c"], rivals: Bool[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Log of the softmax over the rivals times their number; -inf for all others."""
    count = rivals.sum(1, keepdim=True)
    shares = logits.masked_fill(~rivals & (count > 0), -torch.inf).log_softmax(1)
    return (shares + count.clamp(min=1).to(logits.dtype).log()).masked_fill(~rivals, -torch.inf)


@term()
def cwcl(
    z: Embeddings,
    *,
    frozen: Literal["image", "text"] = "image",
    power: Annotated[float, Field(gt=0.0)] = 1.0,
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Every pair is a positive, as much as the frozen side finds the two alike. CWCL, arXiv 2309.14580.

        ½ [ mean_i Σ_j w_ij / (Σ_k w_ik) · -log softmax_j(s u_i·q_j)  +  mean_j CE(s q_j · U, j) ]
        w_ij = sg( (1 + u_i·u_j) / 2 )^power      u the `frozen` side, q the other

    CLIP's cosines lie in a narrow cone, which makes the targets almost uniform; a `power` above 1 sharpens them. In the
    rows of the frozen side captions of one picture are positives; `mask_same_group` acts on the other rows.
    """
    frozen_side, other = (z.image, z.text) if frozen == "image" else (z.text, z.image)
    logits = z.scale * similarity(frozen_side, other)
    # Rounding takes the cosine of opposites below -1.
    likeness = ((1 + similarity(frozen_side, frozen_side).detach()) / 2).clamp(min=0.0) ** power
    soft = contrast_rows(logits, likeness / likeness.sum(1, keepdim=True))
    keep = log_mask(visible(z, mask_same_group))
    plain = contrast_rows(logits.T, diagonal(logits), log_weights=keep)
    return both_ways([soft, plain])


@term(needs=("teacher.image", "teacher.text", "teacher.negative_text?"))
def gist(
    z: Embeddings,
    *,
    margin: NonNegative = 0.0,
    relative: bool = False,
    negatives: Negatives = "none",
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Contrast without the rivals that a guide finds nearer than the pair itself. GISTEmbed, arXiv 2402.16829.

        ½ Σ_(both ways) mean_i CE(s v_i · [T; N], i)      without c where v*_i·c* > v*_i·t*_i - margin

    The guide is the teacher (`teacher.kind: frozen`), whose embeddings may be of another width. With `relative`, the
    bound is (1 - margin) v*_i·t*_i. The paper's texts also meet texts of their own side; here images meet captions
    only, whose cosines lie in another range.
    """
    teacher = z.frozen_teacher("image", "text")
    hard = None if z.negative_text is None else teacher.negative_text
    guide = Embeddings(teacher.image, teacher.text, hard, valid=z.valid, group=z.group)

    def rows(logits: Tensor, keep: Tensor, likeness: Tensor) -> Tensor:
        if likeness.shape != logits.shape:
            raise UserError("gist: the teacher has no negative_text beside the student's; embed the negatives too")
        own = likeness.diagonal()[:, None]
        doubtful = likeness > ((1 - margin) * own if relative else own - margin)
        pair = diagonal(logits)
        return contrast_rows(logits, pair, log_weights=log_mask(keep & ~doubtful | pair))

    guides = [likeness for likeness, _ in sides(guide, mask_same_group, negatives)]
    students = sides(z, mask_same_group, negatives)
    return both_ways([rows(*side, likeness) for side, likeness in zip(students, guides)])


@term()
def macl(
    z: Embeddings,
    *,
    alpha: float = 0.5,
    a0: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.0,
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Contrast whose temperature follows the alignment, with re-weighted gradients. MACL, arXiv 2207.07874.

        ½ Σ_(both ways) mean_i sg(1 / Σ_{j≠i} p_ij) · -log p_ii      p_i = softmax(v_i·T / tau)
        tau = (1 + alpha (A - a0)) / s      A = sg(mean_i v_i·t_i)      the factor at least 0.01

    The weight undoes the (1 - p_ii) in the gradient of a row, which becomes that of `dcl`; a row tends to 1 as
    p_ii → 1. A pair without rivals adds nothing.
    """
    warmth = macl_warmth(_pairs(z).detach().mean(), alpha, a0)

    def rows(logits: Tensor, keep: Tensor) -> Tensor:
        pair = diagonal(logits)
        decoupled = contrast_rows(logits / warmth, pair, log_weights=log_mask(keep), log_alpha=-torch.inf)
        return _reweighted(decoupled).masked_fill(~(keep & ~pair).any(1), 0.0)

    return both_ways([rows(*side) for side in sides(z, mask_same_group)])


def macl_warmth(aligned: Float[Tensor, ""], alpha: float = 0.5, a0: float = 0.0) -> Float[Tensor, ""]:
    """How much warmer than 1 / s `macl` is at the mean cosine `aligned` of the pairs."""
    return (1 + alpha * (aligned - a0)).clamp(min=0.01)


def _reweighted(decoupled: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """sg(1 / (1 - p)) · -log p from d = log((1 - p) / p): the value softplus(d) / sigmoid(d), the slope exactly 1.

    Written out it would be 0 / 0 for p = 1.
    """
    d = decoupled.detach().clamp(min=-40.0)
    return softplus(d) / d.sigmoid() + (decoupled - decoupled.detach())


@term(needs="relevance")
def gcl(z: Embeddings, *, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """CLIP's contrast with each pair's rows weighted by its relevance. GCL, arXiv 2404.08535.

        mean_i r_i ½ [ CE(s v_i · T, i) + CE(s t_i · V, i) ]      r the pair's `relevance`

    The mean is over the pairs, not their weights; a pair of relevance 0 is still a rival to the others.
    """
    if z.relevance is None:
        raise UserError("gcl: needs embeddings.relevance and found none; give each pair of the shards a `relevance`")
    relevance = full(z.relevance)

    def rows(logits: Tensor, keep: Tensor) -> Tensor:
        return relevance * contrast_rows(logits, diagonal(logits), log_weights=log_mask(keep))

    return both_ways([rows(*side) for side in sides(z, mask_same_group)])


def _pairs(z: Embeddings) -> Float[Tensor, " n"]:
    """Cosine of each image and its caption."""
    return (full(z.image) * full(z.text)).sum(1)
