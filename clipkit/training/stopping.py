"""When a run ends early: its evaluations no longer get better.

They lie in evaluations.jsonl, the best weights in best/. The file is the memory: a run that goes on from a checkpoint
drops what is beyond it, as the log does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit import distributed
from clipkit.config import Config
from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation import benchmark
from clipkit.evaluation.pareto import KINDS, Point, choose, point_of
from clipkit.evaluation.result import Result
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.load import save

PARETO = "pareto"


class Stopping:
    """Judges evaluations against all earlier ones. Every rank holds the same and calls each method, together.

    One is better when no earlier one comes within `stop.least` of it in everything that is looked at: the one metric,
    or recognition and composition. Raises UserError, before anything is trained, for a suite that lacks what it needs,
    and for a run that has been judged by another metric.
    """

    def __init__(self, config: Config, folder: Path, start: int):
        self._stop, self._file, self._best = config.stop, folder / "evaluations.jsonl", folder / "best"
        _check(config)
        lines = [json.loads(line) for line in _whole_lines(self._file)] if distributed.is_main() else []
        self.lines: list[dict[str, Any]] = [
            line for line in distributed.gather_objects(lines)[0] if line["step"] <= start
        ]
        """{"step", "metric", "values", "better"} of every evaluation."""
        _check_metric(self.lines, self._stop.metric, self._file)

    def knows(self, step: int) -> bool:
        """Whether the evaluation after this step has been judged."""
        return any(line["step"] == step for line in self.lines)

    @property
    def enough(self) -> bool:
        """Whether so many evaluations in a row as `stop.patience` were no better."""
        last = [line["better"] for line in self.lines[-self._stop.patience :]]
        return len(last) == self._stop.patience and not any(last)

    def judge(self, step: int, results: Sequence[Result], model: DualEncoder) -> None:
        """Take an evaluation in; the model is kept where it is now the best."""
        values = self._values(results)
        better = self._allowed(values) and not any(self._as_good(line["values"], values) for line in self.lines)
        self.lines.append({"step": step, "metric": self._stop.metric, "values": values, "better": better})
        if not distributed.is_main():
            return
        if self.best == step:
            save(model, self._best, evaluation={"step": step, "values": values})
        part = self._file.with_suffix(".tmp")
        part.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(part, self._file)

    @property
    def best(self) -> int:
        """The step of the best evaluation: of `pareto`, what composes best of those with no more loss than allowed."""
        if self._stop.metric == PARETO:
            points = [Point(*line["values"]) for line in self.lines]
            return self.lines[choose(points, self._stop.most_loss)]["step"]
        return max(self.lines, key=lambda line: (line["values"], -line["step"]))["step"]

    def _values(self, results: Sequence[Result]) -> list[float]:
        if self._stop.metric == PARETO:
            point = point_of(results)
            assert point, "the suite was checked"
            return [point.recognition, point.composition]
        name, _, key = self._stop.metric.partition(":")
        found = next(result for result in results if result.benchmark == name)
        key = key or found.headline
        if key not in found.metrics:
            raise UserError(f"stop.metric: {name} has no metric {key}{did_you_mean(key, found.metrics)}")
        value = found.metrics[key].value
        return [-value if key.endswith("rank") else value]

    def _allowed(self, values: list[float]) -> bool:
        if self._stop.metric != PARETO or not self.lines:
            return True
        return values[0] >= self.lines[0]["values"][0] - self._stop.most_loss - 1e-12

    def _as_good(self, earlier: list[float], values: list[float]) -> bool:
        return all(old + self._stop.least >= new for old, new in zip(earlier, values, strict=True))


def _whole_lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def _check_metric(lines: list[dict[str, Any]], metric: str, file: Path) -> None:
    """Values of two metrics cannot be compared; lines that name none are taken as the run's own."""
    if other := next((line for line in lines if line.get("metric", metric) != metric), None):
        raise UserError(
            f"{file}: step {other['step']} was judged by {other['metric']}, and stop.metric is {metric}; resume with "
            f"stop.metric={other['metric']}, or start a new run"
        )


def _check(config: Config) -> None:
    found = [benchmark.load(name) for name in benchmark.suite(config.suite)]
    if config.stop.metric == PARETO:
        if lacking := [kind for kind in KINDS if all(one.kind != kind for one in found)]:
            raise UserError(
                "stop.metric: pareto needs zero-shot and compositional benchmarks; "
                f"suite {config.suite} has no {lacking[0]} one"
            )
        return
    name, known = config.stop.metric.partition(":")[0], [one.name for one in found]
    if name not in known:
        raise UserError(f"stop.metric: {name} is neither pareto nor in suite {config.suite}{did_you_mean(name, known)}")
