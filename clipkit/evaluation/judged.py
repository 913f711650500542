"""Each half of a pair by itself: does this text fit this picture? VALSE's acc, p_c, p_f, AUROC; SVO-Probes' accuracy.

Their authors ask a matching head for a probability and cut at 1/2. A dual encoder has none: each half of the rows is
judged at the threshold that suits the other half best, as true/false rows are. Axes: n rows of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.evaluation.benchmark import Row
from clipkit.evaluation.result import Metric
from clipkit.evaluation.scores import Pattern, Tie, best_threshold, binary_auroc, judged
from clipkit.evaluation.stats import halves, interval, wilson
from clipkit.evaluation.table import Credits, Table

Array = np.ndarray


@dataclass
class Pairs:
    """Rows with one right and one wrong candidate, and the similarities of both."""

    rows: Int[Array, " n"]
    right: Float[Array, " n"]
    wrong: Float[Array, " n"]

    @classmethod
    def of(cls, forms: Sequence[tuple[Pattern, Int[Array, " r"], Float[Array, "r i t"]]]) -> Pairs | None:
        """All pairs among the forms (match, rows, similarities); None where there is none."""
        parts = []
        for match, rows, s in forms:
            flat = [m for line in match for m in line]
            if len(flat) == 2 and {*flat} == {0, 1}:
                values = s.reshape(len(s), 2)
                parts.append((rows, values[:, flat.index(1)], values[:, flat.index(0)]))
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else None

    def thresholds(self, clusters: Sequence[str]) -> Float[Array, " n"]:
        """Of every row, fitted on the other half; `clusters` of these rows stay together."""
        side, out = halves(clusters), np.empty(len(self.rows))
        for half in (0, 1):
            here = side == half
            there = ~here if (~here).any() else here
            s = np.concatenate([self.right[there], self.wrong[there]])
            out[here] = best_threshold(s, np.arange(len(s)) < there.sum())
        return out


def decide(pairs: Pairs, rows: Sequence[Row], tie: Tie) -> tuple[Credits, dict[str, Bool[Array, " n"]]]:
    """Credit and ties under p_right, p_wrong and judged; nan for rows that are no pairs."""
    cuts = pairs.thresholds([rows[n].cluster for n in pairs.rows])
    found = judged(np.stack([pairs.right, pairs.wrong], 1)[:, None], ((1, 0),), cuts, tie=tie)
    assert found is not None, "a pair"
    credits, tied = {}, {}
    for name, decision in found.items():
        credits[name], tied[name] = np.full(len(rows), np.nan), np.zeros(len(rows), dtype=bool)
        credits[name][pairs.rows], tied[name][pairs.rows] = decision
    return credits, tied


def extremes(
    pairs: Pairs, credits: Credits, table: Table, tie: Tie
) -> tuple[dict[str, Metric], dict[str, dict[str, Metric]]]:
    """What is no mean over rows: `worse` (the smaller of p_right and p_wrong) and `auroc`; of all, and by category.

    `micro` is of all rows together, `macro` the mean of the categories.
    """
    everyone = ~np.isnan(credits["p_right"])
    masks = {name: mask & everyone for name, mask in table.masks("category").items() if (mask & everyone).any()}
    whole = {"worse": _worse(credits, everyone, table), "auroc": _area(pairs, everyone, table, tie)}
    parts = {
        name: {"worse": _worse(credits, mask, table), "auroc": _area(pairs, mask, table, tie)}
        for name, mask in masks.items()
    }
    metrics = {f"{score}/micro": _metric(score, *found, int(everyone.sum())) for score, found in whole.items()}
    if len(parts) > 1:
        for score in whole:
            values, draws = zip(*(part[score] for part in parts.values()), strict=True)
            shortest = min(map(len, draws))
            mean = np.mean([line[:shortest] for line in draws], axis=0)
            metrics[f"{score}/macro"] = _metric(score, float(np.mean(values)), mean, int(everyone.sum()))
    by = {
        name: {score: _metric(score, *found, int(masks[name].sum())) for score, found in part.items()}
        for name, part in parts.items()
    }
    return metrics, by


def _worse(credits: Credits, mask: Bool[Array, " n"], table: Table) -> tuple[float, Float[Array, " b"]]:
    drawn = table.resampler.totals(np.ones(len(mask)), mask)
    with np.errstate(invalid="ignore"):
        draws = [table.resampler.totals(credits[name], mask) / drawn for name in ("p_right", "p_wrong")]
    return min(float(credits[name][mask].mean()) for name in ("p_right", "p_wrong")), np.minimum(*draws)


def _area(pairs: Pairs, mask: Bool[Array, " n"], table: Table, tie: Tie) -> tuple[float, Float[Array, " b"]]:
    here = mask[pairs.rows]
    s = np.concatenate([pairs.right[here], pairs.wrong[here]])
    labels, numbers = np.arange(len(s)) < here.sum(), np.tile(pairs.rows[here], 2)
    value = float(binary_auroc(s, labels, tie=tie)[0])
    return value, binary_auroc(s, labels, table.resampler.rows(numbers), tie=tie)


def _metric(score: str, value: float, draws: Float[Array, " b"], n: int) -> Metric:
    draws = draws[~np.isnan(draws)]
    bounds = interval(draws) if len(draws) and np.ptp(draws) else wilson(value * n, n)
    return Metric(value, *bounds, n, 0.5 if score == "auroc" else None)
