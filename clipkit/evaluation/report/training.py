"""How the runs were trained: curves, a summary, and in which settings they differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from clipkit.evaluation.report.charts import curves
from clipkit.evaluation.report.runs import Run
from clipkit.evaluation.report.tables import chip, table
from clipkit.evaluation.report.words import NONE
from clipkit.html import Html, el, join

TITLES = {
    "loss": "loss (weighted sum of the terms)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "scale": "logit scale",
    "samples_per_s": "samples per second",
    "data_wait": "share of time waiting for data",
}
FIRST = ("loss", "term/", "evaluation/", "scale", "lr", "samples_per_s", "grad_norm", "data_wait")


def section(runs: Sequence[Run]) -> Html | None:
    """Curves of all runs over the samples seen, and a table of where they ended."""
    names, trained = [run.name for run in runs], [run for run in runs if run.log]
    if not trained:
        return None
    rows = [_rows(run) for run in runs]
    keys = {key for log in rows for row in log for key in row if _place(key) < len(FIRST)}
    charts = []
    for key in sorted(keys, key=lambda key: (_place(key), key)):
        series = [[(row["samples"], row[key]) for row in log if key in row] for log in rows]
        charts.append(curves(_title(key), series, names))
    legend = el(
        "p",
        "Over the samples seen, neighbouring lines of the log averaged. ",
        [(chip(names, n), " ") for n in range(len(names))],
    )
    return join(legend, el("div", charts, class_="curves"), _summary(runs, rows))


def settings(runs: Sequence[Run]) -> Html | None:
    """The settings in which the runs differ, and all of them folded."""
    configured = [(n, run) for n, run in enumerate(runs) if run.config]
    if not configured:
        return None
    names = [run.name for run in runs]
    heads = ["setting", *(chip(names, n) for n, _ in configured)]
    keys = sorted({key for _, run in configured for key in run.config})
    every = [[key, *(_setting(run, key) for _, run in configured)] for key in keys]
    different = [row for row in every if len(set(row[1:])) > 1]
    fold = el("details", el("summary", "All settings"), table("All settings", heads, every))
    if len(configured) < 2:
        return fold
    shown = table("Settings in which the runs differ", heads, different) if different else el("p", "None differs.")
    return join(shown, fold)


def _rows(run: Run) -> list[dict[str, Any]]:
    """Lines of the log; the numbers of an evaluation as evaluation/NAME."""
    return [
        row | {f"evaluation/{name}": value for name, value in row.get("evaluation", {}).items() if value is not None}
        for row in run.log
    ]


def _place(key: str) -> int:
    """Where a quantity's chart stands; the last place is for those without one."""
    return next((n for n, first in enumerate(FIRST) if key == first or (first[-1] == "/" and first in key)), len(FIRST))


def _title(key: str) -> str:
    kind, _, name = key.partition("/")
    return TITLES.get(key) or {"term": f"term {name}", "evaluation": f"evaluation: {name}"}[kind]


def _summary(runs: Sequence[Run], rows: Sequence[Sequence[dict[str, Any]]]) -> Html:
    body = []
    for run, log in zip(runs, rows):
        steps = [row for row in log if "loss" in row]
        if steps:
            last = steps[-1]
            skipped = sum(value for key, value in last.items() if key.startswith("skipped/"))
            speed = statistics.median(row["samples_per_s"] for row in steps)
            wait = statistics.fmean(row["data_wait"] for row in steps)
            body.append(
                [
                    run.name,
                    last["step"],
                    last["samples"],
                    last["loss"],
                    last["scale"],
                    speed,
                    f"{100 * wait:.1f} %",
                    skipped,
                ]
            )
        else:
            body.append([run.name, *[NONE] * 7])
    heads = ["run", "steps", "samples", "last loss", "last scale", "samples/s (median)", "waiting", "skipped"]
    return table("Where training ended", heads, body)


def _setting(run: Run, key: str) -> str:
    value = run.config.get(key, NONE)
    return value if isinstance(value, str) else str(value)
