"""Embeddings as lists, for the oracle, and the arithmetic of its loops."""

from __future__ import annotations

import math
from copy import copy

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
        self.id, self.group, self.scale = z.id.tolist(), z.group.tolist(), float(z.scale)
        self.relevance = [] if z.relevance is None else z.relevance.tolist()
        self.label = [] if z.label is None else z.label.tolist()
        self.tag_logits, self.tags = ([] if x is None else x.tolist() for x in (z.tag_logits, z.tags))
        if z.negative_image is not None:
            made = zip(z.negative_image.tolist(), z.valid.tolist())
            self.made = [[x for x, ok in zip(r, o) if ok] for r, o in made]
        if z.local_logit is not None and z.negative_local_logit is not None:
            self.local = z.local_logit.tolist()
            worse = zip(z.negative_local_logit.tolist(), z.valid.tolist())
            self.local_n = [[x for x, ok in zip(r, o) if ok] for r, o in worse]
        self.views = [] if z.view_image is None else z.view_image.transpose(0, 1).tolist()
        self.seen = [[] if x is None else x.tolist() for x in (z.image_aspects, z.text_aspects)]
        self.bias = 0.0 if z.bias is None else float(z.bias)
        self.rows = range(len(self.v))
        if z.teacher is not None:
            assert z.teacher.negative_text is not None
            self.v_star, self.t_star = z.teacher.image.tolist(), z.teacher.text.tolist()
            kept = zip(z.teacher.negative_text.tolist(), z.valid.tolist())
            self.n_star = [[x for x, ok in zip(r, o) if ok] for r, o in kept]

    def rivals(self, i: int, mask_same_group: bool) -> list[int]:
        return [j for j in self.rows if j != i and not (mask_same_group and self.group[j] == self.group[i])]

    def alike(self, i: int) -> list[int]:
        return [j for j in self.rows if self.group[j] == self.group[i]]

    def classed(self) -> Pairs:
        """The same pairs, of one group where they are of one class."""
        other = copy(self)
        other.group = [("class", y) if y >= 0 else ("group", g) for y, g in zip(self.label, self.group)]
        return other

    def negatives(self, i: int, which: str) -> list[Vector]:
        owners = {"all": list(self.rows), "own": [i], "none": []}[which]
        return [x for j in owners for x in self.n[j]]
