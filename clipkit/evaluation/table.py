"""From the credit of every row to metrics: named aggregates, breakdowns, chance and intervals.

Axes: n rows. A pool is a set of rows; an aggregate is a weighted mean over pools of the mean in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.benchmark import Benchmark, Mean, Row
from clipkit.evaluation.result import Metric
from clipkit.evaluation.scores import chance, main_score, pattern
from clipkit.evaluation.stats import Pools, Resampler, mean_interval

Array = np.ndarray
JUDGED = ("p_right", "p_wrong", "judged")
"""Scores at a threshold. Whoever says everything fits has the first right and the second wrong: only `judged`, their
mean, has a chance."""
Credits = dict[str, Float[Array, " n"]]
"""Score -> credit of every row, nan where the score does not suit the row."""


class Table:
    """The fields and clusters of a benchmark's rows. `categories`: all that the benchmark has, kept or not."""

    def __init__(self, benchmark: Benchmark, rows: Sequence[Row], categories: set[str]):
        self.benchmark, self.rows = benchmark, rows
        self.resampler = Resampler([row.cluster for row in rows])
        self._masks: dict[str, dict[str, Bool[Array, " n"]]] = {}
        self._chances: Credits = {}
        self._check(categories)

    def metrics(self, credits: Credits) -> dict[str, Metric]:
        """`score/aggregate` -> Metric. An aggregate is left out where a part of it has no row the score suits."""
        return {
            f"{s}/{name}": _metric(c, pools, guess, self.resampler) for s, name, c, guess, pools in self._all(credits)
        }

    def values(self, credits: Credits) -> dict[str, float]:
        """`score/aggregate` -> value alone."""
        return {f"{score}/{name}": mean(c, pools) for score, name, c, _, pools in self._all(credits)}

    def by(self, field: str, credits: Credits) -> dict[str, dict[str, Metric]]:
        """Value of a row field -> score -> Metric."""
        return {
            value: {
                s: _metric(credits[s], [(1.0, pool)], self._chance(s), self.resampler) for s, pool in scores.items()
            }
            for value, scores in self._split(field, credits).items()
        }

    def values_by(self, field: str, credits: Credits) -> dict[str, dict[str, float]]:
        """Value of a row field -> score -> value alone."""
        return {
            value: {s: float(credits[s][pool].mean()) for s, pool in scores.items()}
            for value, scores in self._split(field, credits).items()
        }

    def masks(self, field: str) -> dict[str, Bool[Array, " n"]]:
        """Value of a row field -> its rows."""
        return self._field(field)

    def _all(self, credits: Credits) -> list[tuple[str, str, Array, Array, Pools]]:
        """(score, aggregate, credit and chance of every row, pools) of all aggregates that have rows."""
        several = ["macro"] if len(self._field("category")) > 1 else []
        names = ["micro", *several, *self.benchmark.aggregates]
        made = []
        for score, credit in credits.items():
            for name in names:
                spec = self.benchmark.aggregates.get(name)
                if isinstance(spec, Mean) and spec.together:
                    made.append((score, name, *self._together(spec, credit, self._chance(score))))
                else:
                    made.append((score, name, credit, self._chance(score), self._pools(name, ~np.isnan(credit))))
        return [entry for entry in made if entry[4]]

    def _together(self, spec: Mean, credit: Array, guess: Array) -> tuple[Array, Array, Pools]:
        """The first row of every value stands for all; values that lack rows are left out, unless not `whole`."""
        values = [
            mask & ~np.isnan(credit) for v, mask in self._field(spec.together or "").items() if v not in spec.exclude
        ]
        sizes = [int(mask.sum()) for mask in values]
        joint, joint_guess, first = credit.copy(), guess.copy(), np.zeros(len(credit), dtype=bool)
        for mask, size in zip(values, sizes, strict=True):
            if size and (size == max(sizes) or not spec.whole):
                at = int(mask.argmax())
                joint[at], joint_guess[at], first[at] = credit[mask].prod(), guess[mask].prod(), True
        return joint, joint_guess, _filled([(1.0, first)])

    def _pools(self, name: str, known: Bool[Array, " n"]) -> Pools:
        """The pools of an aggregate or category among the `known` rows; none where a part of it is empty."""
        spec = self.benchmark.aggregates.get(name)
        if isinstance(spec, list):
            parts = [self._of("category", category) & known for category in spec]
            return _filled([(1.0, np.logical_or.reduce(parts))]) if all(part.any() for part in parts) else []
        if isinstance(spec, Mean):
            return self._mean_pools(spec, known)
        if name == "micro":
            return _filled([(1.0, known)])
        if name == "macro":
            return _filled([(1.0, mask & known) for mask in self._field("category").values()])
        return _filled([(1.0, self._of("category", name) & known)])

    def _mean_pools(self, spec: Mean, known: Bool[Array, " n"]) -> Pools:
        if spec.over:
            values = self._field(spec.over).items()
            pools: Pools = [(1.0, mask & known) for value, mask in values if value not in spec.exclude]
            return [(weight, mask) for weight, mask in pools if mask.sum() >= max(1, spec.min_count)]
        parts = [self._pools(name, known) for name in spec.mean or []]
        if not all(parts):
            return []
        return [(weight / sum(w for w, _ in part), mask) for part in parts for weight, mask in part]

    def _split(self, field: str, credits: Credits) -> dict[str, dict[str, Bool[Array, " n"]]]:
        """Value of a field -> score -> its rows, where there are any."""
        return {
            value: {s: pool for s, c in credits.items() if (pool := mask & ~np.isnan(c)).any()}
            for value, mask in self._field(field).items()
        }

    def _chance(self, score: str) -> Float[Array, " n"]:
        if score not in self._chances:
            forms = [pattern(row.match) for row in self.rows]
            truths = [form[0][0] == 1 for form in forms if main_score(form) == "binary"]
            # Saying the same every time is right this often, and that is the guess to beat.
            majority = max(sum(truths), len(truths) - sum(truths)) / max(1, len(truths))
            self._chances[score] = np.array(
                [self._row_chance(row, form, score, majority) for row, form in zip(self.rows, forms, strict=True)]
            )
        return self._chances[score]

    def _row_chance(self, row: Row, form: tuple[tuple[int | None, ...], ...], score: str, majority: float) -> float:
        main = main_score(form)
        wanted = main if score == "accuracy" else score
        if wanted == main and row.category in self.benchmark.chance:
            return self.benchmark.chance[row.category]
        if wanted in JUDGED:
            return 0.5 if wanted == "judged" else float("nan")
        return majority if wanted == "binary" else chance(form, wanted)

    def _of(self, field: str, value: str) -> Bool[Array, " n"]:
        return self._field(field).get(value, np.zeros(len(self.rows), dtype=bool))

    def _field(self, name: str) -> dict[str, Bool[Array, " n"]]:
        if name not in self._masks:
            values = np.array([row.field(name) for row in self.rows])
            self._masks[name] = {str(value): values == value for value in dict.fromkeys(values.tolist())}
        return self._masks[name]

    def _check(self, categories: set[str]) -> None:
        for name, spec in self.benchmark.aggregates.items():
            valid = (
                categories if isinstance(spec, list) else {*categories, *self.benchmark.aggregates, "micro", "macro"}
            )
            wanted = spec if isinstance(spec, list) else spec.mean or []
            for part in wanted:
                if part not in valid:
                    raise UserError(f"{self.benchmark.name}: aggregates.{name}: no {part}{did_you_mean(part, valid)}")


def _metric(credit: Array, pools: Pools, guess: Array, resampler: Resampler) -> Metric:
    n = int(np.logical_or.reduce([mask for _, mask in pools]).sum())
    luck = mean(guess, pools)
    return Metric(*mean_interval(credit, pools, resampler), n, None if np.isnan(luck) else luck)


def mean(values: Float[Array, " n"], pools: Pools) -> float:
    """The weighted mean over pools of the mean of `values` in each."""
    weights = [weight for weight, _ in pools]
    return float(np.dot([values[mask].mean() for _, mask in pools], weights) / np.sum(weights))


def _filled(pools: Pools) -> Pools:
    return [(weight, mask) for weight, mask in pools if mask.any()]
