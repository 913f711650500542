"""What the embeddings of a step look like, for the log: sums and counts, which add up over ranks. Axes: n k d."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clipkit import distributed
from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import similarity
from clipkit.objective.weighted import macl_warmth

Measures = dict[str, tuple[float, int]]
"""(sum, count) by name."""


@torch.no_grad()
def measures(z: Embeddings, kinds: dict[int, str]) -> Measures:
    """Cosines of this rank's pictures: with their captions, with others', and what each kind of negative lacks.

        cosine/positive    v_i · t_i
        cosine/other       v_i · t_j of other groups
        gap/KIND           v_i · t_i - v_i · n_ik          over the valid negatives of the kind
        wrong/KIND         [v_i · n_ik ≥ v_i · t_i]        the share that is not told from the caption
        same_picture       [group_i = group_j], j ≠ i      over the global batch: what `mask_same_group` masks

    `kinds`: names of the numbers in `z.negative_kind`. Every rank asks together.
    """
    cosines = similarity(z.image, z.text)
    own = cosines.diagonal()
    other = cosines[z.group[:, None] != z.group]
    found = {"cosine/positive": (float(own.sum()), len(own)), "cosine/other": (float(other.sum()), other.numel())}
    groups = distributed.all_gather(z.group)
    same = (z.group[:, None] == groups).sum() - len(z)
    found["same_picture"] = (float(same), len(z) * (len(groups) - 1))
    negatives, valid = z.negatives
    if z.negative_kind is not None:
        gaps = own[:, None] - similarity(z.image[:, None], negatives)[:, 0]
        for number, kind in kinds.items():
            these = gaps[valid & (z.negative_kind == number)]
            found[f"gap/{kind}"] = (float(these.sum()), these.numel())
            found[f"wrong/{kind}"] = (float((these <= 0).sum()), these.numel())
    return found


def means(of_ranks: list[Measures]) -> dict[str, float]:
    """The means over all ranks, by name; what was counted nowhere is left out."""
    sums: dict[str, tuple[float, int]] = {}
    for one in of_ranks:
        for name, (value, count) in one.items():
            known = sums.get(name, (0.0, 0))
            sums[name] = (known[0] + value, known[1] + count)
    return {name: value / count for name, (value, count) in sorted(sums.items()) if count}


def pulls(terms: dict[str, Float[Tensor, ""]], z: Embeddings) -> dict[str, float]:
    """Each term's share of the gradient at the embeddings: |∇ term| / Σ |∇ term|, over all ranks and roles.

    `terms` are weighted and made of `z.world()`, `z` being this rank's tables; their graph is kept, no `.grad` is
    touched. Where nothing pulls, the shares are NaN. Every rank asks together and gets the same.
    """
    tables = [x for name, x in z.leaves().items() if name not in ("scale", "bias") and x.requires_grad]
    squares = torch.stack([_square(value, tables) for value in terms.values()])
    lengths = distributed.all_gather(squares[None]).sum(0).sqrt()
    return dict(zip(terms, (lengths / lengths.sum()).tolist()))


def _square(value: Float[Tensor, ""], tables: list[Tensor]) -> Float[Tensor, ""]:
    """The squared length of the gradient at the tables."""
    total = torch.zeros((), dtype=torch.float64, device=value.device)
    if tables and value.requires_grad:
        grads = torch.autograd.grad(value, tables, retain_graph=True, allow_unused=True)
        total = total + sum(grad.double().square().sum() for grad in grads if grad is not None)
    return total


def temperatures(terms: dict[str, dict[str, Any]], scale: float, aligned: float) -> dict[str, float]:
    """The temperature 1/scale and, as `temperature/TERM`, that of a term which makes it follow the mean cosine.

    Infinite where a run has gone so wrong that its scale is 0: it is for the guard to say what becomes of it.
    """
    temperature = 1 / scale if scale else math.inf
    found = {"temperature": temperature}
    if "macl" in terms:
        settings = {name: value for name, value in terms["macl"].items() if name in ("alpha", "a0")}
        found["temperature/macl"] = float(macl_warmth(torch.tensor(aligned), **settings)) * temperature
    return found
