"""One self-contained HTML file about one run or several side by side, with the same numbers as CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.evaluation.report import lines, page, tables
from clipkit.evaluation.report.runs import Run, compare, read_runs
from clipkit.evaluation.result import Metric


def write_report(runs: list[tuple[str, Path]], path: Path) -> Path:
    """Write the report of named run folders to `path`; beside it every number as .csv, every row as .jsonl, and .md.

    A line of .jsonl is a row of a benchmark with what each run made of it. The Markdown is the first table.

    A run folder holds results/*.json, and (if it was trained) metrics.jsonl and config.yaml. All runs are compared
    with the first. Raises UserError for a folder with nothing to report.
    """
    found = read_runs(runs)
    text = page.page(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path.with_suffix(".csv"), _csv(found))
    if any(run.results for run in found):
        _replace(path.with_suffix(".jsonl"), "".join(f"{json.dumps(row)}\n" for row in _rows(found)))
        _replace(path.with_suffix(".md"), _markdown(found))
    _replace(path, text)
    return path


def markdown_table(runs: list[tuple[str, Path]]) -> str:
    """The report's first table in Markdown."""
    return _markdown(read_runs(runs))


def _markdown(runs: list[Run]) -> str:
    return tables.markdown(lines.headlines(compare(runs)), [run.name for run in runs])


def _rows(runs: list[Run]) -> Iterator[dict[str, Any]]:
    """Every row of every benchmark: {"benchmark", "id", "category", "correct": {run: credit}}."""
    for name in dict.fromkeys(name for run in runs for name in run.results):
        found: dict[str, dict[str, Any]] = {}
        for run in runs:
            for item in run.results[name].items if name in run.results else []:
                start = {"benchmark": name, "id": item["id"], "category": item["category"], "correct": {}}
                found.setdefault(item["id"], start)["correct"][run.name] = item["correct"]
        yield from found.values()


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _csv(runs: list[Run]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "benchmark", "kind", "field", "group", "metric", "value", "low", "high", "n", "chance"])
    for run, benchmark, kind, *place, metric in _numbers(runs):
        writer.writerow([run, benchmark, kind, *place, metric.value, metric.low, metric.high, metric.n, metric.chance])
    return out.getvalue()


def _numbers(runs: list[Run]) -> Iterator[tuple[str, str, str, str, str, str, Metric]]:
    """(run, benchmark, kind, field, value of the field, metric's name, metric)."""
    for run in runs:
        for name, result in run.results.items():
            fields = {"": {"": result.metrics}, "category": result.by_category, **result.breakdowns}
            for field, groups in fields.items():
                for group, metrics in groups.items():
                    for key, metric in metrics.items():
                        yield run.name, name, result.kind, field, group, key, metric
