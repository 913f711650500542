"""The masked, weighted contrast that every softmax-like term is made of. Axes: a anchors, c candidates, e extra terms.

For one anchor with logits L and log-weights log w (-inf takes a candidate out, positives get + log_alpha):

    log p_c = L_c - LSE({L_c' + log w_c'}, {extra})
    row     = -Σ_c target_c (1 - p_c)^gamma log p_c      (mean_log)     or     -log Σ_{target_c > 0} p_c      (log_sum)

`contrast_tables` makes the same rows from embeddings, in tiles where the matrix of logits would be large.
Everything is computed in fp32 at least, also under autocast and from bf16 or fp16 embeddings; fp64 stays fp64.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Mode = Literal["mean_log", "log_sum"]


def full(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def similarity(a: Float[Tensor, "*n a d"], b: Float[Tensor, "*n c d"]) -> Float[Tensor, "*n a c"]:
    """Dot products in full precision."""
    with torch.autocast(a.device.type, enabled=False):
        return full(a) @ full(b).mT


def log_mask(keep: Bool[Tensor, "a c"]) -> Float[Tensor, "a c"]:
    """Log-weights of a mask: 0 keeps a candidate, -inf takes it out."""
    return keep.float().log()


def contrast_rows(
    logits: Float[Tensor, "a c"],
    targets: Float[Tensor, "a c"] | Bool[Tensor, "a c"],
    *,
    log_weights: Float[Tensor, "#a #c"] | None = None,
    log_alpha: float = 0.0,
    extra: Float[Tensor, "a e"] | None = None,
    gamma: float = 0.0,
    mode: Mode = "mean_log",
) -> Float[Tensor, " a"]:
    """One loss per anchor, by the formula above. `targets` are weights ≥ 0; those > 0 mark the positives.

    A row without a positive, or with nothing to be contrasted against, is 0 and sends no gradient.
    `log_alpha=-inf` takes the positives out of the denominator (DCL); `extra` adds log-terms to it (TCL).
    """
    logits, positive = full(logits), targets > 0
    terms = logits if log_weights is None else logits + log_weights
    if log_alpha:
        terms = torch.where(positive, terms + log_alpha, terms)
    if extra is not None:
        terms = torch.cat([terms, extra], 1)
    # The gradient of a log-sum-exp over nothing but -inf is NaN, even when the row is dropped later.
    empty = (~positive.any(1) | (terms == -torch.inf).all(1))[:, None]
    log_p = logits - terms.masked_fill(empty, 0.0).logsumexp(1, keepdim=True)
    if mode == "log_sum":
        rows = -log_p.masked_fill(~(positive | empty), -torch.inf).logsumexp(1)
    else:
        # log p may exceed 0 outside the denominator; kept just below 0, (1 - p)^gamma has a finite slope.
        below = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)
        focal = (-below.expm1()) ** gamma if gamma else 1.0
        rows = -(targets * focal * log_p).sum(1)
    return rows.masked_fill(empty[:, 0], 0.0)


def mean_rows(
    rows: Float[Tensor, " a"],
    *,
    weights: Float[Tensor, " a"] | None = None,
    counted: Bool[Tensor, " a"] | None = None,
) -> Float[Tensor, ""]:
    """Σ weight · row over the counted rows, divided by their number (not by the weights); 0 when no row counts."""
    if weights is not None:
        rows = rows * weights
    if counted is None:
        return rows.sum() / max(len(rows), 1)
    return rows.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
