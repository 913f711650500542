"""Which rows are shown as examples, and how far wrong they are."""

from __future__ import annotations

import math

import pytest

from clipkit.evaluation.result import furthest_wrong, pick, wrong_by


@pytest.mark.parametrize(
    ("scores", "match", "gap"),
    [
        ([[0.3, 0.5, 0.4]], [[1, 0, 0]], 0.2),
        ([[0.3, 0.5, 0.9]], [[1, 0, None]], 0.2),
        ([[0.3, 0.6, 0.4]], [[1, 1, 0]], -0.2),
        ([[0.3], [0.7]], [[1], [0]], 0.4),
        ([[0.9, 0.1], [0.2, 0.8]], [[1, 0], [0, 1]], -0.6),
        ([[0.9, 0.1], [0.95, 0.97]], [[1, 0], [0, 1]], 0.05),  # its first text is nearer to the second picture
    ],
)
def test_wrong_by(scores: list[list[float]], match: list[list[int | None]], gap: float):
    assert wrong_by(scores, match) == pytest.approx(gap)


def test_true_or_false_stands_against_nothing():
    assert math.isnan(wrong_by([[0.5]], [[0]]))


def test_the_worst_are_among_the_examples():
    correct = [float(n % 3 == 0) for n in range(90)]
    gaps = [math.nan if n == 50 else n / 100 for n in range(90)]
    worst = furthest_wrong(correct, gaps)
    assert worst == [89, 88, 86, 85]
    chosen = pick(correct, wrong_by=gaps)
    assert set(worst) < set(chosen) and len(chosen) == 16 and sum(correct[n] == 1 for n in chosen) == 8
    assert chosen == sorted(set(chosen)) == pick(correct, wrong_by=gaps)
    assert len(pick(correct)) == 16 and len(pick([1.0] * 40)) == 16 and len(pick([0.0] * 40, wrong_by=range(40))) == 16
    assert furthest_wrong([1.0, 1.0], [0.5, 0.7]) == [] == furthest_wrong([0.0], [])
