"""Contrast inside a pair: an anchor, its own caption and that caption's own negatives."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import contrast_rows, full, log_mask, mean_rows, similarity
from clipkit.registry import term


@term(needs="negative_text")
def igc(z: Embeddings) -> Float[Tensor, ""]:
    """Image-grounded contrast: each image against its caption and that caption's negatives. DeGLA, arXiv 2504.16801.

    mean_i -log( e^{s v_i·t_i} / (e^{s v_i·t_i} + Σ_k e^{s v_i·n_ik}) )     over pairs with a valid negative
    """
    return _own_negatives(z, z.image, z.text, z.scale)


@term(needs=("negative_text", "teacher"))
def tgc(z: Embeddings, *, scale: Annotated[float, Field(gt=0.0)] = 10.0) -> Float[Tensor, ""]:
    """Text-grounded contrast: each caption against its teacher's embedding and its negatives. DeGLA, arXiv 2504.16801.

        mean_i -log( e^{c t_i·t*_i} / (e^{c t_i·t*_i} + Σ_k e^{c t_i·n_ik}) )     over pairs with a valid negative

    `scale` is the fixed factor c. The negatives are the pair's own; the released code's mask picks other pairs'.
    """
    return _own_negatives(z, z.text, z.frozen_teacher().text, scale)


def _own_negatives(
    z: Embeddings, anchor: Float[Tensor, "n d"], positive: Float[Tensor, "n d"], scale: Tensor | float
) -> Float[Tensor, ""]:
    negatives, valid = z.negatives
    candidates = torch.cat([full(positive)[:, None], full(negatives)], 1)
    logits = scale * similarity(anchor[:, None], candidates)[:, 0]
    first = torch.zeros_like(logits, dtype=torch.bool)
    first[:, 0] = True
    rows = contrast_rows(logits, first, log_weights=log_mask(pad(valid, (1, 0), value=True)))
    return mean_rows(rows, counted=valid.any(1))
