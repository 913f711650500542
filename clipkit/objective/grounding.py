"""Contrast with negative captions: an anchor, its own caption and that caption's negatives."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import contrast_rows, full, log_mask, mean_rows, similarity
from clipkit.registry import term
from clipkit.settings import Share


@term(needs="negative_text")
def igc(z: Embeddings) -> Float[Tensor, ""]:
    """Image-grounded contrast: each image against its caption and that caption's negatives. DeGLA, arXiv 2504.16801.

    mean_i -log( e^{s v_i·t_i} / (e^{s v_i·t_i} + Σ_k e^{s v_i·n_ik}) )     over pairs with a valid negative
    """
    negatives, valid = z.negatives
    return _mean(z.scale * _cosines(z.image, z.text, negatives), valid, log_weight=z.negative_log_weight)


@term(needs=("negative_text", "teacher.text", "teacher_width"))
def tgc(
    z: Embeddings, *, scale: Annotated[float, Field(gt=0.0)] = 10.0, mask: Literal["own", "repeat"] = "own"
) -> Float[Tensor, ""]:
    """Text-grounded contrast: each caption against its teacher's embedding and its negatives. DeGLA, arXiv 2504.16801.

        mean_i -log( e^{c t_i·t*_i} / (e^{c t_i·t*_i} + Σ_k e^{c t_i·n_ik}) )     over pairs with a valid negative

    `scale` is the fixed factor c. With `mask: repeat`, the released code's mistake for those who reproduce its figures,
    row i takes the entries i, i + n, i + 2n ... of the negatives laid out pair by pair: nearly always other pairs'.
    """
    (negatives, valid), weight = z.negatives, z.negative_log_weight
    if mask == "repeat":
        n, k = valid.shape
        negatives = negatives.flatten(0, 1).unflatten(0, (k, n)).transpose(0, 1)
        valid, weight = (table.flatten().unflatten(0, (k, n)).T for table in (valid, weight))
    return _mean(scale * _cosines(z.text, z.frozen_teacher("text").text, negatives), valid, log_weight=weight)


@term(needs="negative_text")
def imc(z: Embeddings, *, negatives: Literal["all", "own"] = "all") -> Float[Tensor, ""]:
    """Intra-modal contrast: each caption against its picture and negative captions. CE-CLIP, arXiv 2306.08832.

        mean_i -log( e^{s v_i·t_i} / (e^{s v_i·t_i} + Σ_n e^{s t_i·n}) )     over pairs with a negative

    n runs over the negatives of `all` pairs, as first released, or of the pair itself (`own`). A later release lost the
    positive and drew every caption to one negative.
    """
    table, valid = z.negatives
    if negatives == "own":
        return _mean(z.scale * _cosines(z.text, z.image, table), valid)
    own = similarity(z.text[:, None], z.image[:, None])[:, 0]
    cosines = torch.cat([own, similarity(z.text, table.flatten(0, 1))], 1)
    return _mean(z.scale * cosines, valid.flatten().expand(len(z), -1))


@term(needs="negative_text")
def fsc_global(
    z: Embeddings, *, gamma: Annotated[float, Field(ge=0.0)] = 2.0, smoothing: Share = 0.02
) -> Float[Tensor, ""]:
    """`igc` with focal weights and smoothed labels. FSC-CLIP's global hard-negative loss, arXiv 2410.05210.

        mean_i Σ_k y_ik (1 - p_ik)^gamma -log p_ik      p_i = softmax(s v_i·[t_i; n_i1; ...])
        y_ik = (1 - smoothing) 1[k = 0] + smoothing / (1 + K_i)      over the caption and its K_i valid negatives

    Over pairs with a valid negative. The released code left negatives that do not exist in the softmax, with logit 0.
    """
    negatives, valid = z.negatives
    return _calibrated(z.scale * _cosines(z.image, z.text, negatives), valid, gamma, smoothing)


@term(needs=("negative_text", "local_logit"))
def fsc_local(
    z: Embeddings, *, gamma: Annotated[float, Field(ge=0.0)] = 2.0, smoothing: Share = 0.02
) -> Float[Tensor, ""]:
    """`fsc_global` between words and patches. FSC-CLIP's local hard-negative loss, arXiv 2410.05210.

        mean_i Σ_k y_ik (1 - p_ik)^gamma -log p_ik      p_i = softmax([S(v_i, t_i); S(v_i, n_i1); ...])
        S(v, t) = log Σ_w e^{s cos(v_w, e_w)}           v_w the picture's patches as word e_w attends to them

    y and the mean as in `fsc_global`; S is `clipkit.model.local.local_logits`.
    """
    if z.local_logit is None or z.negative_local_logit is None or z.valid is None:
        raise UserError("fsc_local: needs embeddings.local_logit and negative_local_logit and found none")
    logits = torch.cat([full(z.local_logit)[:, None], full(z.negative_local_logit)], 1)
    return _calibrated(logits, z.valid, gamma, smoothing)


def _calibrated(
    logits: Float[Tensor, "n c"], valid: Bool[Tensor, "n k"], gamma: float, smoothing: float
) -> Float[Tensor, ""]:
    """Focal rows with smoothed labels over the caption, the first candidate, and its valid negatives."""
    keep = pad(valid, (1, 0), value=True).to(logits.dtype)
    targets = smoothing * keep / keep.sum(1, keepdim=True)
    targets[:, 0] += 1 - smoothing
    return _mean(logits, valid, targets, gamma)


@term(needs=("positive_text", "negative_text"))
def spurious(z: Embeddings) -> Float[Tensor, ""]:
    """Each picture against the prompts of its own spurious attribute and of the others. Yang et al., arXiv 2304.03916.

        mean_(i,p) -log( e^{s v_i·a_ip} / (e^{s v_i·a_ip} + Σ_k e^{s v_i·n_ik}) )

    a_ip are the pair's further captions ("a photo with a water background"), n_ik its negatives, what the other
    attributes would have been called: with all of them there it is the cross-entropy over attributes. Over further
    captions with a valid negative.
    """
    if z.positive_text is None or z.positive_valid is None:
        raise UserError("spurious: needs embeddings.positive_text and found none; set data.positives")
    negatives, valid = z.negatives
    row, place = z.positive_valid.nonzero(as_tuple=True)
    return _mean(z.scale * _cosines(z.image[row], z.positive_text[row, place], negatives[row]), valid[row])


def _cosines(
    anchor: Float[Tensor, "n d"], positive: Float[Tensor, "n d"], negatives: Float[Tensor, "n k d"]
) -> Float[Tensor, "n c"]:
    """Each anchor with its positive, then with its negatives."""
    candidates = torch.cat([full(positive)[:, None], full(negatives)], 1)
    return similarity(anchor[:, None], candidates)[:, 0]


def _mean(
    logits: Float[Tensor, "n c"],
    valid: Bool[Tensor, "n k"],
    targets: Float[Tensor, "n c"] | None = None,
    gamma: float = 0.0,
    log_weight: Float[Tensor, "n k"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over the rows with a valid negative; the positive is the first candidate and, by default, the target."""
    first = torch.zeros_like(logits, dtype=torch.bool)
    first[:, 0] = True
    keep = log_mask(pad(valid, (1, 0), value=True)) if log_weight is None else pad(log_weight, (1, 0))
    valid = valid if log_weight is None else log_weight > -torch.inf
    rows = contrast_rows(logits, first if targets is None else targets, log_weights=keep, gamma=gamma)
    return mean_rows(rows, counted=valid.any(1))
