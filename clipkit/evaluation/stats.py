"""Uncertainty: Wilson and cluster-bootstrap intervals, AUROC, exact McNemar, paired bootstrap, Holm.

Axes: n rows, m of them, c clusters, b bootstrap replicates. Shares lie between 0 and 1; intervals are 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Array = np.ndarray

Pools = Sequence[tuple[float, Bool[Array, " n"]]]
"""Weighted sets of rows, as masks."""

Z95 = 1.959963984540054


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson score interval of the proportion right/n (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


class Resampler:
    """Cluster bootstrap: how often each row is drawn in each of b seeded resamples of whole clusters.

    Drawn once a benchmark and shared by all its metrics.
    """

    def __init__(self, clusters: Sequence[str], *, replicates: int = 1000, seed: int = 0):
        names, self.codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
        self.clusters, rng = len(names), np.random.default_rng(seed)
        self.weights: Float[Array, "b c"] = np.empty((replicates, self.clusters), dtype=np.float32)
        for line in self.weights:
            line[:] = np.bincount(rng.integers(0, self.clusters, self.clusters), minlength=self.clusters)

    def totals(self, values: Float[Array, " n"], mask: Bool[Array, " n"]) -> Float[Array, " b"]:
        """Sum of `values` over the masked rows, in every resample."""
        return self.weights @ np.bincount(self.codes[mask], values[mask], self.clusters).astype(np.float32)

    def rows(self, numbers: Int[Array, " m"], most: int = 2**27) -> Float[Array, "b m"]:
        """How often each of these rows is drawn; of very many rows in the first resamples only (`most` numbers)."""
        return self.weights[: max(100, most // max(1, len(numbers))), self.codes[numbers]]

    def distinct(self, mask: Bool[Array, " n"]) -> int:
        """Number of clusters among the masked rows."""
        return len(np.unique(self.codes[mask]))


POWER = 0.8416212335729143
"""The normal quantile of a power of 80 %."""


def detectable(low: float, high: float, *, paired: bool = False) -> float:
    """The smallest difference found at the 5 % level with a power of 80 %, from a 95 % interval.

    `paired`: the interval is of a difference. Otherwise of one model's share, and the other model is taken to be as
    uncertain and independent of it: paired on the same rows, models that agree more find smaller differences.
    """
    error = (high - low) / (2 * Z95)
    return (Z95 + POWER) * error * (1.0 if paired else math.sqrt(2))


def interval(draws: Float[Array, " b"]) -> tuple[float, float]:
    """The middle 95 % of bootstrap draws."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Float[Array, " n"], pools: Pools, resampler: Resampler) -> tuple[float, float, float]:
    """(value, low, high) of a weighted mean over pools of the mean of `values` in each pool.

    One pool of independent rows, each right or wrong: Wilson. Otherwise the cluster bootstrap; where that has no
    spread (all right, all wrong), Wilson with as many rows as there are clusters.
    """
    everyone = np.logical_or.reduce([mask for _, mask in pools])
    value = _weighted([float(values[mask].mean()) for _, mask in pools], [w for w, _ in pools])
    distinct = resampler.distinct(everyone)
    binary = bool(np.isin(values[everyone], (0.0, 1.0)).all())
    if len(pools) == 1 and binary and distinct == int(everyone.sum()):
        return value, *wilson(value * distinct, distinct)
    if distinct == 1 or np.ptp(values[everyone]) == 0:
        return value, *wilson(value * distinct, distinct)
    return value, *interval(_mean_draws(values, pools, resampler))


def _mean_draws(values: Float[Array, " n"], pools: Pools, resampler: Resampler) -> Float[Array, " b"]:
    """The weighted mean over pools in every resample; nan where it misses all of them, else of those it has."""
    ones = np.ones_like(values)
    with np.errstate(invalid="ignore"):
        draws = np.stack([resampler.totals(values, m) / resampler.totals(ones, m) for _, m in pools], axis=1)
        weights = np.where(np.isnan(draws), 0.0, np.array([w for w, _ in pools]))
        return (np.nan_to_num(draws) * weights).sum(1) / weights.sum(1)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return float(np.dot(values, weights) / np.sum(weights))


def auroc(
    scores: Float[Array, " n"],
    labels: Bool[Array, " n"],
    weights: Float[Array, "b n"] | None = None,
    *,
    tie: float = 0.5,
) -> Float[Array, " b"]:
    """Probability that a right row scores above a wrong one; a tie counts `tie`. One value a line of `weights`."""
    if weights is None:
        weights = np.ones((1, len(scores)), dtype=np.float32)
    _, group = np.unique(scores, return_inverse=True)
    starts = np.flatnonzero(np.diff(np.sort(group), prepend=-1))
    order = np.argsort(group, kind="stable")
    drawn, truth = weights[:, order], labels[order]
    right = np.add.reduceat(np.where(truth, drawn, 0.0), starts, axis=1)
    wrong = np.add.reduceat(np.where(truth, 0.0, drawn), starts, axis=1)
    below = np.cumsum(wrong, axis=1) - wrong
    pairs = right.sum(1) * wrong.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (right * (below + tie * wrong)).sum(1) / pairs


def median(values: Float[Array, " n"], weights: Float[Array, "b n"]) -> Float[Array, " b"]:
    """Weighted (lower) medians, one a line of `weights`."""
    order = np.argsort(values, kind="stable")
    passed = np.cumsum(weights[:, order], axis=1)
    return values[order][np.argmax(passed >= passed[:, -1:] / 2, axis=1)]


@dataclass(frozen=True)
class McNemar:
    """Two models on the same rows: how many only one of them has right, and how likely so uneven a split is."""

    only_first: int
    only_second: int
    p: float

    @property
    def chi2(self) -> float:
        """The statistic with continuity correction (Edwards 1948), for comparison with published ones."""
        discordant = self.only_first + self.only_second
        return max(0, abs(self.only_first - self.only_second) - 1) ** 2 / discordant if discordant else 0.0


def mcnemar(first: Sequence[float] | Array, second: Sequence[float] | Array) -> McNemar:
    """Exact two-sided McNemar test on right (1) or wrong (0) of the same rows in the same order."""
    a, b = np.asarray(first) == 1, np.asarray(second) == 1
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    n, k = only_first + only_second, min(only_first, only_second)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return McNemar(only_first, only_second, min(1.0, 2 * math.fsum(math.exp(x) for x in logs)))


@dataclass(frozen=True)
class Difference:
    """Second minus first, with its interval and a two-sided bootstrap p."""

    value: float
    low: float
    high: float
    p: float

    @property
    def detectable(self) -> float:
        """The smallest difference that these rows would have shown four times of five."""
        return detectable(self.low, self.high, paired=True)


def paired_bootstrap(
    first: Sequence[float] | Array,
    second: Sequence[float] | Array,
    clusters: Sequence[str],
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> Difference:
    """The difference of two models' means over the same rows, resampling clusters of rows."""
    gap = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    everyone = np.ones(len(gap), dtype=bool)
    return paired_difference(gap, [(1.0, everyone)], Resampler(clusters, replicates=replicates, seed=seed))


def paired_difference(gap: Float[Array, " n"], pools: Pools, resampler: Resampler) -> Difference:
    """The weighted mean over pools of the mean `gap` (second minus first, row by row) in each pool."""
    value = _weighted([float(gap[mask].mean()) for _, mask in pools], [w for w, _ in pools])
    draws = _mean_draws(gap, pools, resampler)
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Difference(value, *interval(draws), min(1.0, 2 * (beyond + 1) / (len(draws) + 1)))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm-adjusted p-values (Holm 1979), in the order given."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    adjusted, worst = {}, 0.0
    for rank, name in enumerate(ordered):
        worst = max(worst, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p_values}


def halves(clusters: Sequence[str], seed: int = 0) -> Int[Array, " n"]:
    """0 or 1 for every row, whole clusters on one side, seeded."""
    names, codes = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    side = np.random.default_rng(seed).permutation(len(names)) % 2
    return side[codes]
