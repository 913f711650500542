"""What a fine-tune changed: its start model on the same benchmarks, and the difference row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clipkit.evaluation.report.paired import Pairing
from clipkit.evaluation.result import Result
from clipkit.evaluation.stats import detectable, holm


def run_of(model: str) -> Path | None:
    """The run folder that a reference to a run, or to one of its checkpoints, means; None for other models."""
    return next((folder for folder in (Path(model), *Path(model).parents) if (folder / "checkpoints").is_dir()), None)


def start_of(run: Path) -> str:
    """The model that a run began from, as its config names it; empty where it began from random weights."""
    config = run / "config.yaml"
    model = (yaml.safe_load(config.read_text()) or {}).get("model", {}) if config.is_file() else {}
    name = model.get("name") or ""
    return model.get("start") or (name if ":" in name else "")


def differences(before: Sequence[Result], after: Sequence[Result]) -> list[dict[str, Any]]:
    """Of every benchmark, its headline before and after, the paired difference, its interval and Holm-corrected p.

    What cannot be paired row by row has the difference alone.
    """
    found = []
    for first, second in zip(before, after, strict=True):
        change = Pairing(first, second).metric(second.headline)
        assert change is not None, "one benchmark, one headline"
        found.append(
            {
                "benchmark": second.benchmark,
                "metric": second.headline,
                "start": first.score.value,
                "now": second.score.value,
                "difference": change.value,
                "low": change.low,
                "high": change.high,
                "detectable": None if change.low is None or change.high is None else _least(change.low, change.high),
                "p": change.p,
            }
        )
    corrected = holm({line["benchmark"]: line["p"] for line in found if line["p"] is not None})
    return [line | {"p": corrected.get(line["benchmark"])} for line in found]


def _least(low: float, high: float) -> float:
    """The smallest difference that the rows of a paired interval would have shown."""
    return detectable(low, high, paired=True)
