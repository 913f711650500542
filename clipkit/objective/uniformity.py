"""How near pairs lie, and how evenly embeddings spread over the sphere."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import diagonal, visible
from clipkit.objective.distill import squared_distance
from clipkit.objective.kernel import full, mean_rows, similarity
from clipkit.registry import term
from clipkit.settings import Positive

AboveZero = Annotated[float, Field(gt=0.0)]


@term()
def alignment(z: Embeddings, *, alpha: AboveZero = 2.0) -> Float[Tensor, ""]:
    """Distance of each image to its caption. Wang and Isola, arXiv 2005.10242.

    mean_i ‖v_i - t_i‖^alpha
    """
    squared = squared_distance(z.image, z.text)
    # Pairs that coincide must not have an infinite slope.
    return mean_rows(squared.clamp(min=torch.finfo(squared.dtype).tiny) ** (alpha / 2))


@term()
def uniformity(z: Embeddings, *, t: AboveZero = 2.0, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """How unevenly images, and captions, lie on the sphere. Wang and Isola, arXiv 2005.10242.

        ½ Σ_{x = v, t} log mean_{i<j} e^{-t ‖x_i - x_j‖²}

    The least value is about -2t. Pairs of one picture do not push each other unless `mask_same_group` is off.
    """
    keep = visible(z, mask_same_group)
    keep = keep & ~diagonal(keep)
    return (_log_potential(z.image, keep, t) + _log_potential(z.text, keep, t)) / 2


def _log_potential(x: Float[Tensor, "n d"], keep: Bool[Tensor, "n n"], t: float) -> Float[Tensor, ""]:
    length = full(x).square().sum(1)
    distance = (length[:, None] + length - 2 * similarity(x, x)).clamp(min=0.0)
    count = keep.sum()
    energies = (-t * distance).masked_fill(~keep & (count > 0), -torch.inf)
    mean = energies.flatten().logsumexp(0) - count.clamp(min=1).to(energies.dtype).log()
    return mean.masked_fill(count == 0, 0.0)


@term()
def tic(
    z: Embeddings,
    *,
    top: Positive = 10,
    cap: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.95,
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Pushes each caption from those nearest to it. FG-CLIP 2's textual intra-modal contrast, arXiv 2510.10921.

        mean_i log Σ_{j ∈ top(i)} e^{t_i·t_j}      the `top` nearest other captions with t_i·t_j ≤ cap

    Without positive and without temperature: a pure repulsion. What lies above `cap` says the same thing. A caption
    with fewer neighbours has as many as there are; one without any does not count.
    """
    cosines = similarity(z.text, z.text)
    near = visible(z, mask_same_group) & ~diagonal(cosines) & (cosines <= cap)
    nearest = cosines.masked_fill(~near, -torch.inf).topk(min(top, len(z)), 1).values
    alone = ~near.any(1)
    return mean_rows(nearest.masked_fill(alone[:, None], 0.0).logsumexp(1), counted=~alone)
