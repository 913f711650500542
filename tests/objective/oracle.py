"""Every term once more, as the plain loops of its definition: slow, obvious, and sharing no code with the package."""

from __future__ import annotations

import math
from typing import Any

from clipkit.model.embeddings import Embeddings

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b))


def squared_distance(a: Vector, b: Vector) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b))


def cross_entropy(positive: float, others: list[float]) -> float:
    return -math.log(math.exp(positive) / (math.exp(positive) + sum(math.exp(x) for x in others)))


class Pairs:
    """The tables of `Embeddings` as lists; `n[i]` holds only the valid negatives of pair i."""

    def __init__(self, z: Embeddings):
        assert z.negative_text is not None and z.valid is not None
        self.v, self.t = z.image.tolist(), z.text.tolist()
        self.n = [[x for x, ok in zip(r, o) if ok] for r, o in zip(z.negative_text.tolist(), z.valid.tolist())]
        self.group, self.scale = z.group.tolist(), float(z.scale)
        self.bias = 0.0 if z.bias is None else float(z.bias)
        self.rows = range(len(self.v))
        if z.teacher is not None:
            assert z.teacher.negative_text is not None
            self.v_star, self.t_star = z.teacher.image.tolist(), z.teacher.text.tolist()
            kept = zip(z.teacher.negative_text.tolist(), z.valid.tolist())
            self.n_star = [[x for x, ok in zip(r, o) if ok] for r, o in kept]

    def rivals(self, i: int, mask_same_group: bool) -> list[int]:
        return [j for j in self.rows if j != i and not (mask_same_group and self.group[j] == self.group[i])]

    def negatives(self, i: int, which: str) -> list[Vector]:
        owners = {"all": list(self.rows), "own": [i], "none": []}[which]
        return [x for j in owners for x in self.n[j]]


def infonce(p: Pairs, negatives: str = "all", mask_same_group: bool = True) -> float:
    total = 0.0
    for i in p.rows:
        rivals = p.rivals(i, mask_same_group)
        pair = p.scale * dot(p.v[i], p.t[i])
        texts = [p.t[j] for j in rivals] + p.negatives(i, negatives)
        total += cross_entropy(pair, [p.scale * dot(p.v[i], x) for x in texts])
        total += cross_entropy(pair, [p.scale * dot(p.t[i], p.v[j]) for j in rivals])
    return total / (2 * len(p.rows))


def igc(p: Pairs) -> float:
    rows = [
        cross_entropy(p.scale * dot(p.v[i], p.t[i]), [p.scale * dot(p.v[i], x) for x in p.n[i]])
        for i in p.rows
        if p.n[i]
    ]
    return sum(rows) / len(rows) if rows else 0.0


def tgc(p: Pairs, scale: float = 10.0) -> float:
    rows = [
        cross_entropy(scale * dot(p.t[i], p.t_star[i]), [scale * dot(p.t[i], x) for x in p.n[i]])
        for i in p.rows
        if p.n[i]
    ]
    return sum(rows) / len(rows) if rows else 0.0


def distill(p: Pairs, reference_batch: int = 256) -> float:
    total = 0.0
    for i in p.rows:
        total += squared_distance(p.v[i], p.v_star[i]) + squared_distance(p.t[i], p.t_star[i])
        total += sum(squared_distance(x, y) for x, y in zip(p.n[i], p.n_star[i]))
    return reference_batch * total / len(p.rows)


def siglip(p: Pairs, negatives: str = "none", mask_same_group: bool = True) -> float:
    total = 0.0
    for i in p.rows:
        total += math.log(1 + math.exp(-(p.scale * dot(p.v[i], p.t[i]) + p.bias)))
        texts = [p.t[j] for j in p.rivals(i, mask_same_group)] + p.negatives(i, negatives)
        total += sum(math.log(1 + math.exp(p.scale * dot(p.v[i], x) + p.bias)) for x in texts)
    return total / len(p.rows)


TERMS = {f.__name__: f for f in (infonce, igc, tgc, distill, siglip)}


def term(name: str, z: Embeddings, settings: dict[str, Any]) -> float:
    return TERMS[name](Pairs(z), **settings)


def contrast_row(
    logits: Vector,
    targets: Vector,
    weights: Vector,
    alpha: float = 1.0,
    extra: Vector = (),  # type: ignore[assignment]
    gamma: float = 0.0,
    mode: str = "mean_log",
) -> float:
    """One row of the kernel; weights and alpha are plain factors, `extra` are logarithms."""
    below = sum(math.exp(x) for x in extra)
    for x, target, weight in zip(logits, targets, weights):
        below += weight * (alpha if target > 0 else 1.0) * math.exp(x)
    shares = [math.exp(x) / below for x in logits]
    if mode == "log_sum":
        return -math.log(sum(p for p, target in zip(shares, targets) if target > 0))
    return -sum(t * (max(1 - p, 0.0) ** gamma if gamma else 1.0) * math.log(p) for t, p in zip(targets, shares) if t)
