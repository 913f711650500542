"""Recognition against composition: who beats whom, the front, and what is chosen."""

from __future__ import annotations

import random

import pytest

from clipkit.errors import UserError
from clipkit.evaluation.pareto import Point, choose, front, mean, point_of
from tests.evaluation.report_runs import compositional, retrieval, zeroshot


def test_front_by_a_loop():
    draw = random.Random(0)
    points = [Point(draw.randint(0, 6) / 6, draw.randint(0, 6) / 6) for _ in range(60)]
    expected = []
    for n, one in enumerate(points):
        beaten = False
        for other in points:
            no_worse = other.recognition >= one.recognition and other.composition >= one.composition
            beaten |= no_worse and (other.recognition, other.composition) != (one.recognition, one.composition)
        if not beaten:
            expected.append(n)
    assert front(points) == expected and not Point(0.5, 0.5).beats(Point(0.5, 0.5))


@pytest.mark.parametrize(("most_loss", "expected"), [(0.0, 1), (0.05, 2), (0.1, 2), (0.2, 3), (1.0, 4)])
def test_what_is_chosen(most_loss: float, expected: int):
    """The first is the start; equal composition goes to the one that recognises more."""
    places = [(0.8, 0.5), (0.8, 0.6), (0.75, 0.7), (0.65, 0.9), (0.1, 0.95), (0.6, 0.9)]
    assert choose([Point(*place) for place in places], most_loss) == expected


def test_points_are_means_of_headlines():
    results = [compositional(3), zeroshot(9), zeroshot(5), retrieval(5)]
    point = point_of(results)
    assert point == Point((results[1].score.value + results[2].score.value) / 2, results[0].score.value)
    both = mean(results[1:3])
    assert both.low < both.value < both.high and both.n == 120
    assert point_of([compositional(3), retrieval(5)]) is None
    with pytest.raises(UserError, match="evaluate zero-shot and compositional benchmarks"):
        choose([], 0.1)
