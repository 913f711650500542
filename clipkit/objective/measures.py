"""What the embeddings of a step look like, for the log: sums and counts, which add up over ranks. Axes: n k d."""

from __future__ import annotations

import torch

from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import similarity

Measures = dict[str, tuple[float, int]]
"""(sum, count) by name."""


@torch.no_grad()
def measures(z: Embeddings, kinds: dict[int, str]) -> Measures:
    """Cosines of this rank's pictures: with their captions, with others', and what each kind of negative lacks.

        cosine/positive    v_i · t_i
        cosine/other       v_i · t_j of other groups
        gap/KIND           v_i · t_i - v_i · n_ik          over the valid negatives of the kind
        wrong/KIND         [v_i · n_ik ≥ v_i · t_i]        the share that is not told from the caption

    `kinds`: names of the numbers in `z.negative_kind`.
    """
    cosines = similarity(z.image, z.text)
    own = cosines.diagonal()
    other = cosines[z.group[:, None] != z.group]
    found = {"cosine/positive": (float(own.sum()), len(own)), "cosine/other": (float(other.sum()), other.numel())}
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
