"""Several views of one thing: a picture and its caption, further crops and further captions."""

from __future__ import annotations

from itertools import combinations, permutations
from math import log
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import diagonal, visible
from clipkit.objective.groups import LOG_5000, LogFactor, tuned_rows
from clipkit.objective.kernel import contrast_rows, log_mask, mean_rows, similarity
from clipkit.objective.sorting import upper_share
from clipkit.registry import term
from clipkit.settings import Positive

AboveZero = Annotated[float, Field(gt=0.0)]
View = tuple[Float[Tensor, "n d"], Bool[Tensor, " n"]]
"""One embedding an instance, and which instances have it."""


@term()
def mv_infonce(z: Embeddings, *, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """One contrast an instance over all ordered pairs of views. MV-InfoNCE, arXiv 2507.06979.

        mean_i -log( Σ_{l≠k} e^{s z_li·z_ki} / Σ_{l≠k} Σ_j e^{s z_li·z_kj} )      views z_1 = v, z_2 = t, ...

    Not CLIP's contrast: all directions stand in one fraction. Further views of the picture (`data.views`) and further
    captions (`data.positives`) are views, too; an instance may lack some of them.
    """
    views, keep = _views(z), visible(z, mask_same_group)
    logits = [z.scale * similarity(a, b) for (a, _), (b, _) in permutations(views, 2)]
    exist = [here[:, None] & there for (_, here), (_, there) in permutations(views, 2)]
    pairs, seen = (torch.cat([both & mask for both in exist], 1) for mask in (diagonal(keep), keep))
    return mean_rows(contrast_rows(torch.cat(logits, 1), pairs, log_weights=log_mask(seen), mode="log_sum"))


@term()
def mv_dhel(z: Embeddings, *, mask_same_group: bool = True) -> Float[Tensor, ""]:
    """Views drawn together, instances pushed apart within each view alone. MV-DHEL, arXiv 2507.06979.

        mean_i -log( Σ_{l≠k} e^{s z_li·z_ki} / Π_l Σ_{j≠i} e^{s z_li·z_lj} )      views z_1 = v, z_2 = t, ...

    Views as in `mv_infonce`. An instance with nothing to be pushed from adds nothing. The value may be negative.
    """
    views, keep = _views(z), visible(z, mask_same_group)
    drawn = [
        (z.scale * similarity(a[:, None], b[:, None])[:, :, 0]).masked_fill(~(here & there)[:, None], -torch.inf)
        for (a, here), (b, there) in combinations(views, 2)
    ]
    together = log(2) + torch.cat(drawn, 1).logsumexp(1, keepdim=True)  # n 1, both orders

    def rows(view: View, together: Tensor) -> Tensor:
        table, here = view
        logits = z.scale * similarity(table, table)
        pair = diagonal(logits)
        seen = keep & here[:, None] & here
        logits = torch.where(pair, together, logits)
        return contrast_rows(logits, pair, log_weights=log_mask(seen), log_alpha=-torch.inf)

    first, *others = views
    apart = [rows(view, torch.zeros_like(together)) for view in others]
    return mean_rows(torch.stack([rows(first, together), *apart]).sum(0))


def _views(z: Embeddings) -> list[View]:
    every = torch.ones_like(z.group, dtype=torch.bool)
    views = [(z.image, every), (z.text, every)]
    if z.view_image is not None:
        views += [(view, every) for view in z.view_image.unbind(1)]
    if z.positive_text is not None and z.positive_valid is not None:
        views += zip(z.positive_text.unbind(1), z.positive_valid.unbind(1))
    return views


@term(needs="view_image")
def tcl_views(
    z: Embeddings, *, scale: AboveZero = 10.0, log_k1: LogFactor = LOG_5000, log_k2: LogFactor = 0.0
) -> Float[Tensor, ""]:
    """`tcl` among pictures alone, without captions: a picture's views are each other's positives. arXiv 2305.10675.

        mean_a -1/|P| Σ_{p∈P} ( c x_a·x_p - log D_a )      a the n (1 + V) views, P the others of the anchor's group
        D_a = Σ_P e^{c x_a·x_p} + k1 Σ_P e^{-x_a·x_p} + k2 Σ_N e^{c x_a·x_n}

    c is the fixed `scale`. `log_k1: -.inf` is SupCon's form, with one further view SimCLR's (arXiv 2002.05709).
    """
    views = _pictures("tcl_views", z)
    x, group = torch.cat(views), z.group.repeat(len(views))
    cosines = similarity(x, x)
    apart = ~diagonal(cosines)
    return mean_rows(tuned_rows(cosines, (group[:, None] == group) & apart, apart, scale, log_k1, log_k2))


@term(needs="view_image")
def groco(
    z: Embeddings, *, top: Positive = 10, steepness: AboveZero = 1.0, mask_same_group: bool = True
) -> Float[Tensor, ""]:
    """Sorts the other views of a picture before other pictures, softly. GroCo, arXiv 2301.02009.

        mean over anchors of  1/(P + K) [ Σ_positives -log q  +  Σ_negatives -log(1 - q) ]

    The anchor's P positives are the picture's other views, its K negatives the `top` nearest of the same view of other
    pictures. q is the probability that a network of soft swaps sorts a cosine among the P highest
    (`clipkit.objective.sorting`; `steepness` multiplies the differences). Only the anchor learns. A picture with fewer
    negatives has as many as there are; one without any adds nothing. At steepness 1 cosines are hardly sorted and the
    value stays far from 0: it is their order that it improves.
    """
    views = _pictures("groco", z)
    rivals = visible(z, mask_same_group)
    rivals = rivals & ~diagonal(rivals)
    positives, negatives = [], []
    for number, anchor in enumerate(views):
        others = torch.stack(views[:number] + views[number + 1 :], 1).detach()
        positives.append(similarity(anchor[:, None], others)[:, 0].sort(1).values)
        cosines = similarity(anchor, anchor.detach()).masked_fill(~rivals, -torch.inf)
        nearest = cosines.topk(min(top, len(z)), 1).values.flip(1)
        negatives.append(pad(nearest, (top - nearest.shape[1], 0), value=-torch.inf))
    return mean_rows(_sorting_rows(torch.cat(negatives), torch.cat(positives), steepness))


def _sorting_rows(
    negatives: Float[Tensor, "a k"], positives: Float[Tensor, "a p"], steepness: float
) -> Float[Tensor, " a"]:
    """Cross entropies of being sorted to the right side, both sides ascending; negatives of -inf do not exist."""
    k, p = negatives.shape[1], positives.shape[1]
    there = pad(negatives > -torch.inf, (0, p), value=True)
    values = torch.cat([negatives.masked_fill(negatives == -torch.inf, 0.0), positives], 1)
    above = upper_share(values, there, p, steepness)
    right = torch.cat([1 - above[:, :k], above[:, k:]], 1).clamp(min=torch.finfo(above.dtype).tiny)
    return -(right.log() * there).sum(1) / there.sum(1)


def _pictures(name: str, z: Embeddings) -> list[Float[Tensor, "n d"]]:
    if z.view_image is None:
        raise UserError(f"{name}: needs embeddings.view_image and found none; set data.views to 1 or more")
    return [z.image, *z.view_image.unbind(1)]
