"""Several projections of each picture and caption, compared at temperatures of every pair's own. Axes: n h a."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import diagonal, visible
from clipkit.objective.kernel import full, mean_rows, similarity
from clipkit.registry import term
from clipkit.settings import Positive

Temperature = Annotated[float, Field(gt=0.0)]


@term(needs=("image_aspects",))
def amcl(
    z: Embeddings,
    *,
    hardest: Positive = 100,
    beta: Annotated[float, Field(ge=0.0)] = 1e-4,
    least: Temperature = 1e-5,
    most: Temperature = 2.0,
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Several heads, each pair at a temperature of its own. AMCL, arXiv 2310.05615 (2.1), (3), (5), as released.

        Σ_h mean_i -s_ii/τ_ii + mean_{j ∈ hard(i)} s_ij/τ_ij
                   + beta ( a/2 log τ_ii + 1/τ_ii - Σ_{j ∈ hard(i)} (log τ_ij + 1/τ_ij) )
        τ_ij = least + (most - least) σ(-φ(x_hi)·φ(y_hj))

    Both directions, each x, y the heads' projections (`model.heads.aspects`), s their cosine, φ one small network for
    all. hard(i): the `hardest` others most alike. The regulariser of the others pulls towards `least`, which alone
    bounds the loss from below: its value means little, and 1/`least` is the largest weight that a pair can have.
    Raises UserError without such heads, and where `most` is not above `least`.
    """
    if z.image_aspects is None or z.text_aspects is None:
        raise UserError("amcl: needs embeddings.image_aspects and found none; set model.heads.aspects.count")
    if most <= least:
        raise UserError(f"amcl.most: should be above least, {least}; got {most}")
    others = visible(z, mask_same_group)
    others = others & ~diagonal(others)
    total = torch.zeros((), dtype=full(z.image_aspects).dtype, device=others.device)
    for pictures, texts in zip(z.image_aspects.unbind(1), z.text_aspects.unbind(1)):
        cosines = similarity(pictures[:, 0], texts[:, 0])
        tau = least + (most - least) * torch.sigmoid(-similarity(pictures[:, 1], texts[:, 1]))
        width = pictures.shape[-1]
        for s, t, rivals in ((cosines, tau, others), (cosines.T, tau.T, others.T)):
            total = total + mean_rows(_rows(s, t, rivals, hardest, beta, width)) / 2
    return total


def _rows(
    cosines: Float[Tensor, "n n"],
    tau: Float[Tensor, "n n"],
    rivals: Bool[Tensor, "n n"],
    hardest: int,
    beta: float,
    width: int,
) -> Float[Tensor, " n"]:
    ranked = cosines.detach().masked_fill(~rivals, -torch.inf)
    hard = ranked.topk(min(hardest, len(cosines)), 1).indices
    there = rivals.gather(1, hard)
    own, cool = tau.diagonal(), tau.gather(1, hard)
    away = (cosines.gather(1, hard) / cool).masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp(min=1)
    held = (cool.log() + 1 / cool).masked_fill(~there, 0.0).sum(1)
    return away - cosines.diagonal() / own + beta * (width / 2 * own.log() + 1 / own - held)
