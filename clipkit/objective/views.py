"""A picture and its caption as views of one thing: one term an instance, over all views at once."""

from __future__ import annotations

from itertools import permutations
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import diagonal, visible
from clipkit.objective.kernel import contrast_rows, log_mask, mean_rows, similarity
from clipkit.registry import term


@term()
def mv_infonce(z: Embeddings, *, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """One contrast an instance over all ordered pairs of views. MV-InfoNCE, arXiv 2507.06979.

        mean_i -log( Σ_{l≠k} e^{s z_li·z_ki} / Σ_{l≠k} Σ_j e^{s z_li·z_kj} )      views z_1 = v, z_2 = t

    Not CLIP's contrast: both directions stand in one fraction.
    """
    logits = [z.scale * similarity(a, b) for a, b in permutations((z.image, z.text), 2)]
    pair, keep = diagonal(logits[0]), log_mask(visible(z, mask_same_group))
    both = [torch.cat([block] * len(logits), 1) for block in (pair, keep)]
    return mean_rows(contrast_rows(torch.cat(logits, 1), both[0], log_weights=both[1], mode="log_sum"))


@term()
def mv_dhel(z: Embeddings, *, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """Views drawn together, instances pushed apart within each view alone. MV-DHEL, arXiv 2507.06979.

        mean_i -log( Σ_{l≠k} e^{s z_li·z_ki} / Π_l Σ_{j≠i} e^{s z_li·z_lj} )      views z_1 = v, z_2 = t

    An instance with nothing to be pushed from adds nothing. The value may be negative.
    """
    drawn = log(2) + z.scale * similarity(z.image[:, None], z.text[:, None])[:, :, 0]  # n 1, both orders
    keep = log_mask(visible(z, mask_same_group))

    def rows(view: Tensor, together: Tensor) -> Tensor:
        logits = z.scale * similarity(view, view)
        pair = diagonal(logits)
        logits = torch.where(pair, together, logits)
        return contrast_rows(logits, pair, log_weights=keep, log_alpha=-torch.inf)

    return mean_rows(rows(z.image, drawn) + rows(z.text, torch.zeros_like(drawn)))
