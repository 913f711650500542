"""Two results of one benchmark, row by row: how far apart they are, and whether chance explains it.

Axes: n rows that both have.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from clipkit.evaluation.result import Result
from clipkit.evaluation.stats import Pools, Resampler, mcnemar, paired_difference

Array = np.ndarray
REPLICATES = (1000, 4000)
"""Of the bootstrap, fewest and most: its smallest p should survive Holm's correction over a few dozen tests."""
WEIGHTS = 20_000_000
"""Most replicates × rows above the fewest replicates (80 MB)."""


@dataclass(frozen=True)
class Change:
    """Second minus first. Without rows to compare, only the value."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test: str = ""


class Pairing:
    """Compares metrics of `second` with those of `first` on the rows they share."""

    def __init__(self, first: Result, second: Result):
        self.first, self.second = first, second
        theirs = {item["id"]: item for item in second.items}
        self.pairs = [(item, theirs[item["id"]]) for item in first.items if item["id"] in theirs]
        self.categories = np.array([item["category"] for item, _ in self.pairs])
        self.clusters = tuple(item["cluster"] for item, _ in self.pairs)

    def metric(self, key: str) -> Change | None:
        """The change of a metric (`score/aggregate`); None unless both have it."""
        first, second = self.first.metrics.get(key), self.second.metrics.get(key)
        if first is None or second is None:
            return None
        credits = self._credits(key)
        pools = self._pools(key.rpartition("/")[2], ~np.isnan(credits[:, 0] + credits[:, 1]))
        return self._change(credits, pools) or Change(second.value - first.value)

    def category(self, category: str, score: str) -> Change | None:
        """The change of a score in one category."""
        credits = self._credits(score)
        return self._change(credits, [(1.0, (self.categories == category) & ~np.isnan(credits[:, 0] + credits[:, 1]))])

    def _credits(self, key: str) -> Float[Array, "n 2"]:
        rules = [result.tie.get("rule") for result in (self.first, self.second)]
        rows = [[_credit(item, key, rule) for item, rule in zip(pair, rules, strict=True)] for pair in self.pairs]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def _change(self, credits: Float[Array, "n 2"], pools: Pools | None) -> Change | None:
        if not pools or not all(mask.any() for _, mask in pools):
            return None
        everyone = np.logical_or.reduce([mask for _, mask in pools])
        resampler = _resampler(self.clusters)
        gap = paired_difference(credits[:, 1] - credits[:, 0], pools, resampler)
        independent = resampler.distinct(everyone) == everyone.sum()
        if len(pools) == 1 and independent and np.isin(credits[everyone], (0.0, 1.0)).all():
            p = mcnemar(credits[everyone, 0], credits[everyone, 1]).p
            return Change(gap.value, gap.low, gap.high, p, "exact McNemar")
        return Change(gap.value, gap.low, gap.high, gap.p, "paired bootstrap")

    def _pools(self, name: str, known: Bool[Array, " n"]) -> Pools | None:
        """The pools of rows behind an aggregate, None where the result does not say which they are."""
        spec = self.first.about.get("aggregates", {}).get(name)
        if isinstance(spec, list):
            return [(1.0, np.isin(self.categories, spec) & known)]
        if spec and spec["mean"]:
            parts = [self._pools(part, known) for part in spec["mean"]]
            return [(w / len(part), mask) for part in parts if part for w, mask in part] if all(parts) else None
        if spec and spec["over"] == "category":
            pools = self._by_category(known, set(spec["exclude"]))
            return [(1.0, mask) for _, mask in pools if mask.sum() >= spec["min_count"]]
        if spec or name == "mean_per_class":  # rows or a thousand classes that would take minutes; top-1 is tested
            return None
        if name == "macro":
            return self._by_category(known)
        return [(1.0, (self.categories == name) & known if name in self.categories else known)]

    def _by_category(self, known: Bool[Array, " n"], without: set[str] | None = None) -> Pools:
        names = [name for name in dict.fromkeys(self.categories[known]) if name not in (without or ())]
        return [(1.0, (self.categories == name) & known) for name in names]


@lru_cache(maxsize=2)
def _resampler(clusters: tuple[str, ...]) -> Resampler:
    """Shared by runs that have the same rows; not kept for all benchmarks, it is large."""
    return Resampler(clusters, replicates=int(np.clip(WEIGHTS // len(clusters), *REPLICATES)))


def _credit(item: dict[str, Any], key: str, rule: str | None) -> float | None:
    """What a row adds to a metric, None where it adds nothing or the item does not tell."""
    score, _, aggregate = key.partition("/")
    if "decisions" in item:
        return item["decisions"].get(score)
    if aggregate and item["category"] != score:
        return None
    if key in ("top1", "mean_per_class") or aggregate == "r1":
        return item["correct"]
    # Half a point for a tie is not in the rank.
    within = (aggregate or key).removeprefix("top").removeprefix("r")
    return float(item["rank"] <= int(within)) if within.isdigit() and rule != "half" else None
