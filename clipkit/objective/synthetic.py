"""Rivals that were made: pictures drawn after negative captions, and mixtures of a picture and its caption."""

from __future__ import annotations

from math import pi
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import diagonal, infonce, visible
from clipkit.objective.kernel import contrast_rows, full, log_mask, mean_rows, similarity
from clipkit.registry import term
from clipkit.settings import Share


@term(needs=("negative_text", "negative_image"))
def triplet(z: Embeddings, *, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """Pairs and the pairs made from their negatives, each the other's hard captions. TripletCLIP, arXiv 2411.02545.

        N(v, t | t') + N(v', t' | t)      N(a, p | q) = ½ [ mean_i CE(s a_i · [P; Q], i) + mean_i CE(s p_i · A, i) ]

    t' are the negative captions and v' the negative pictures; the k-th shows what the k-th caption says: a true pair
    where both exist. A negative caption without a picture is only a candidate.
    """
    image, text, exists = _made_pairs(z, "triplet")
    made = z.scale * similarity(image, text)
    logits = torch.cat([made, z.scale * similarity(image, z.text)], 1)
    keep = torch.cat([exists, torch.ones_like(z.group, dtype=torch.bool)])[None]
    images = contrast_rows(logits, diagonal(logits), log_weights=log_mask(keep))
    texts = contrast_rows(made.T, diagonal(made), log_weights=log_mask(exists[None]))
    negative_pairs = (mean_rows(images, counted=exists) + mean_rows(texts, counted=exists)) / 2
    return infonce(z, negatives="all", mask_same_group=mask_same_group) + negative_pairs


@term(needs=("negative_text", "negative_image"))
def generative_negatives(z: Embeddings, *, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """CLIP's contrast over all pairs, those made from negatives included. Generative Negative Mining, arXiv 2311.03964.

        `infonce` of the n pairs (v_i, t_i) and the made pairs (v'_ik, t'_ik) in one batch

    The k-th negative picture shows what the k-th negative caption says. So captions meet negative pictures and pictures
    negative captions, and each made pair is an anchor, too. A negative caption without a picture takes no part.
    """
    image, text, exists = _made_pairs(z, "generative_negatives")
    row = exists.nonzero()[:, 0]
    fresh = z.group.min().clamp(max=0) - 1 - torch.arange(len(row), device=row.device)  # of nobody's picture
    every = Embeddings(
        torch.cat([z.image, image[row]]),
        torch.cat([z.text, text[row]]),
        group=torch.cat([z.group, fresh]),
        scale=z.scale,
        replicated=z.replicated,
    )
    return infonce(every, negatives="none", mask_same_group=mask_same_group)


def _made_pairs(z: Embeddings, name: str) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"], Bool[Tensor, " m"]]:
    """Negative pictures, negative captions and which of them are pairs. Raises UserError where a picture is missing."""
    table, valid = z.negatives
    if z.negative_image is None or z.negative_image.shape != table.shape:
        found = None if z.negative_image is None else tuple(z.negative_image.shape)
        raise UserError(f"{name}: needs a negative picture for each negative caption {tuple(table.shape)}, got {found}")
    exists = valid if z.negative_image_valid is None else valid & z.negative_image_valid
    return z.negative_image.flatten(0, 1), table.flatten(0, 1), exists.flatten()


@term()
def m2_mix(
    z: Embeddings,
    *,
    scale: Annotated[float, Field(gt=0.0)] = 100.0,
    lam: Share | None = None,
    mask_same_group: bool = True,
) -> Float[Tensor, ""]:
    """Contrast with points between other pairs' pictures and captions. Geodesic multi-modal mixup, arXiv 2203.03897.

        mean_i CE(c v_i · [t_i; m_j, j≠i], i) + mean_i CE(c t_i · [v_i; m_j, j≠i], i)      c the fixed `scale`
        m_j = ( sin(lam θ_j) v_j + sin((1 - lam) θ_j) t_j ) / sin θ_j      θ_j = arccos v_j·t_j

    `lam` is drawn for each batch from Beta(½, ½), as a function of the ids in it, unless it is given. To be added to
    `infonce` with a small weight (0.01).
    """
    share = arcsine(z.id).to(full(z.image).dtype) if lam is None else lam
    mixed = between(full(z.image), full(z.text), share)
    keep = log_mask(visible(z, mask_same_group))

    def rows(anchor: Tensor, own: Tensor) -> Tensor:
        pairs = similarity(anchor, own)
        logits = scale * torch.where(diagonal(pairs), pairs, similarity(anchor, mixed))
        return contrast_rows(logits, diagonal(logits), log_weights=keep)

    return mean_rows(rows(z.image, z.text)) + mean_rows(rows(z.text, z.image))


def between(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], share: Tensor | float) -> Float[Tensor, "n d"]:
    """The point of unit length on the great circle from b (`share` 0) to a (1)."""
    # Where the two coincide, arccos has no slope and the sines no ratio; a hair beside, the mixture is linear.
    angle = (a * b).sum(1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    return normalize((share * angle).sin() * a + ((1 - share) * angle).sin() * b, dim=1)


def arcsine(ids: Int64[Tensor, " n"]) -> Float[Tensor, ""]:
    """A draw from Beta(½, ½) that is a function of the set of ids, the same on every rank and in a resumed run."""
    uniform = (ids.sum() * 2654435761 % 2**32).double() / 2**32  # Knuth's multiplicative hash
    return (uniform * pi / 2).sin() ** 2
