"""The terms of tags and classes as plain loops."""

from __future__ import annotations

import math

from tests.objective.pairs import Pairs, cross_entropy, dot


def stc(p: Pairs, reduction: str = "mean") -> float:
    rows = []
    for logits, tags in zip(p.tag_logits, p.tags):
        if any(tags):
            losses = [math.log(1 + math.exp(-x if there else x)) for x, there in zip(logits, tags)]
            rows.append(sum(losses) if reduction == "sum" else sum(losses) / len(losses))
    return sum(rows) / len(rows) if rows else 0.0


def class_similarity(p: Pairs, of: str = "both") -> float:
    known = [i for i in p.rows if p.label[i] >= 0]
    total = 0.0
    for x in {"image": [p.v], "text": [p.t], "both": [p.v, p.t]}[of]:
        for i in known:
            same = [dot(x[i], x[j]) for j in known if p.label[j] == p.label[i]]
            other = [dot(x[i], x[j]) for j in known if p.label[j] != p.label[i]]
            total += (abs(sum(other)) - sum(same)) / len(known) / len(known)
    return total


def spurious(p: Pairs) -> float:
    rows = [
        cross_entropy(p.scale * dot(p.v[i], own), [p.scale * dot(p.v[i], x) for x in p.n[i]])
        for i in p.rows
        for own in p.made[i]
        if p.n[i]
    ]
    return sum(rows) / len(rows) if rows else 0.0
