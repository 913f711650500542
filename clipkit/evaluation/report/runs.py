"""What a report is made from: runs, and the benchmarks they share."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clipkit.errors import UserError
from clipkit.evaluation.report.paired import Pairing
from clipkit.evaluation.result import Result

KINDS = ("compositional", "zeroshot", "retrieval", "robustness")


@dataclass
class Run:
    """A model with its results, and how it was trained where that is known."""

    name: str
    results: dict[str, Result]
    log: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    config: dict[str, Any]
    """Dotted name -> value."""


@dataclass
class Compared:
    """One benchmark: a result (or None) for every run; `pairings` sets each one beside the first run's."""

    results: list[Result | None]
    pairings: list[Pairing | None]

    @property
    def any(self) -> Result:
        """One of the results, for what they all share."""
        return next(result for result in self.results if result)

    @property
    def anchor(self) -> str:
        """Where its part of the report is linked to."""
        return f"benchmark-{self.any.benchmark}"


def read_runs(runs: list[tuple[str, Path]]) -> list[Run]:
    """Read named run folders. Raises UserError for a folder with nothing to report, or one that cannot be read."""
    seen: Counter[str] = Counter()
    out = []
    for name, folder in runs:
        seen[name] += 1
        out.append(_read(name if seen[name] == 1 else f"{name} ({seen[name]})", Path(folder)))
    return out


def compare(runs: list[Run]) -> list[Compared]:
    """All benchmarks that some run has, by kind and title."""
    names = {name: result for run in runs for name, result in run.results.items()}
    ordered = sorted(names, key=lambda name: (KINDS.index(names[name].kind), names[name].title, name))
    out = []
    for name in ordered:
        first, *others = results = [run.results.get(name) for run in runs]
        out.append(Compared(results, [Pairing(first, other) if first and other else None for other in others]))
    return out


def _read(name: str, folder: Path) -> Run:
    files, log, config = sorted(folder.glob("results/*.json")), folder / "metrics.jsonl", folder / "config.yaml"
    if not files and not log.is_file():
        raise UserError(
            f"{folder}: nothing to report: no results/*.json and no metrics.jsonl; `clipkit eval` makes them"
        )
    results = [Result.read(file) for file in files]
    lines = log.read_text().splitlines() if log.is_file() else []
    tree = yaml.safe_load(config.read_text()) if config.is_file() else {}
    return Run(name, {result.benchmark: result for result in results}, [_finite(line) for line in lines], _flat(tree))


def _finite(line: str) -> dict[str, Any]:
    """A line of the log without what is not a number (a missing point is better than a broken curve)."""
    row = json.loads(line)
    return {k: v for k, v in row.items() if not (isinstance(v, float) and not math.isfinite(v))}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        out |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out
