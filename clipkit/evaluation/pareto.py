"""What a fine-tune trades against each other: recognition (zero-shot) and composition, as means of headlines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clipkit.errors import UserError
from clipkit.evaluation.result import Metric, Result

KINDS = ("zeroshot", "compositional")


@dataclass(frozen=True)
class Point:
    """Where a model stands: both accuracies between 0 and 1."""

    recognition: float
    composition: float

    def beats(self, other: Point) -> bool:
        """Whether it is better in one way and no worse in the other."""
        better = self.recognition > other.recognition or self.composition > other.composition
        return better and self.recognition >= other.recognition and self.composition >= other.composition


def mean(results: Sequence[Result]) -> Metric:
    """The mean of headlines, of benchmarks that share no rows."""
    scores = [result.score for result in results]
    value = sum(score.value for score in scores) / len(scores)
    half = math.sqrt(sum(((score.high - score.low) / 2) ** 2 for score in scores)) / len(scores)
    return Metric(value, max(0.0, value - half), min(1.0, value + half), sum(score.n for score in scores))


def point_of(results: Sequence[Result]) -> Point | None:
    """None where one of the two kinds is missing."""
    by_kind = [[result for result in results if result.kind == kind] for kind in KINDS]
    return Point(*(mean(found).value for found in by_kind)) if all(by_kind) else None


def front(points: Sequence[Point]) -> list[int]:
    """The points that no other beats."""
    return [n for n, point in enumerate(points) if not any(other.beats(point) for other in points)]


def choose(points: Sequence[Point], most_loss: float) -> int:
    """The one that composes best of those that lost at most so much recognition against the first.

    Of equals the one that recognises more, then the earlier one. Raises UserError where there are no points.
    """
    if not points:
        raise UserError("nothing to choose from: evaluate zero-shot and compositional benchmarks")
    floor = points[0].recognition - most_loss - 1e-12
    within = [n for n, point in enumerate(points) if point.recognition >= floor]
    return max(within, key=lambda n: (points[n].composition, points[n].recognition, -n))
