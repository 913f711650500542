"""Tables that can be sorted: one for lines of metrics, one for anything."""

from __future__ import annotations

from collections.abc import Sequence

from clipkit.evaluation.report.lines import Line, adjusted
from clipkit.evaluation.report.paired import Change
from clipkit.evaluation.report.words import NONE, number, p_value, signed, span, verdict
from clipkit.evaluation.result import Metric
from clipkit.html import Html, el, join

MARKS = "●■▲◆✚▼"
"""A run's mark, beside its colour."""


def chip(names: Sequence[str], run: int) -> Html:
    """A run's mark and name in its colour."""
    return el("span", mark(run), f"\u00a0{names[run]}", class_="run")


def mark(run: int) -> Html:
    """A run's mark in its colour."""
    return el("span", MARKS[run % len(MARKS)], class_=f"mark run-{run % len(MARKS)}", aria_hidden="true")


def metric_table(caption: str, heads: Sequence[str], lines: Sequence[Line], names: Sequence[str]) -> Html:
    """Values with intervals for every run, changes against the first, chance, blind, published numbers, rows."""
    corrected, models = adjusted(lines), list(dict.fromkeys(model for line in lines for model in line.published))
    blind, chance = any(line.blind for line in lines), any(line.chance is not None for line in lines)
    columns = [
        *(join(head) for head in heads),
        *(chip(names, run) for run in range(len(names))),
        *(el("span", chip(names, run), f" − {names[0]}", class_="run") for run in range(1, len(names))),
        *([join("chance")] if chance else []),
        *([join("blind")] if blind else []),
        *(join(model, ", published") for model in models),
        join("n"),
    ]
    rows = []
    for place, line in enumerate(lines):
        rows.append(
            [
                *_labels(line),
                *(_value(metric, line.key) for metric in line.metrics),
                *(_change(change, line.key, corrected.get((place, run))) for run, change in enumerate(line.changes)),
                *([_plain(line.chance, line.key)] if chance else []),
                *([_blind(line)] if blind else []),
                *(_plain(line.published.get(model), line.key) for model in models),
                el("td", f"{line.n:,}", class_="number", data_sort=line.n),
            ]
        )
    return _table(caption, columns, rows)


def table(caption: str, heads: Sequence[str | Html], rows: Sequence[Sequence[str | Html | float]]) -> Html:
    """Any other table: the first column names the row, numbers stand to the right."""
    return _table(caption, heads, [[el("th", str(row[0]), scope="row"), *map(_cell, row[1:])] for row in rows])


def _table(caption: str, columns: Sequence[str | Html], rows: Sequence[Sequence[Html]]) -> Html:
    heads = [el("th", el("button", head, type="button"), scope="col") for head in columns]
    inner = el(
        "table",
        el("caption", el("span", caption)),
        el("thead", el("tr", heads)),
        el("tbody", (el("tr", row) for row in rows)),
        class_="sortable",
    )
    return el("div", inner, class_="scroll", role="region", tabindex="0", aria_label=caption)


def _cell(value: str | Html | float) -> Html:
    if isinstance(value, str):
        return el("td", value)
    return el("td", f"{value:,}" if isinstance(value, int) else f"{value:.4g}", class_="number", data_sort=value)


def _labels(line: Line) -> list[Html]:
    first, *others = line.labels
    title = line.note or None
    name = el("a", first, href=f"#{line.anchor}") if line.anchor and others else first
    head = el("th", name, title=None if others else title, scope="row")
    return [head, *(el("td", text, title=title) for text in others)]


def _value(metric: Metric | None, key: str) -> Html:
    if metric is None:
        return el("td", NONE, class_="number")
    parts = [el("span", number(metric.value, key), class_="value"), " ", el("span", span(metric, key), class_="span")]
    return el("td", parts, class_="number", data_sort=metric.value)


def _change(change: Change | None, key: str, p: float | None) -> Html:
    if change is None:
        return el("td", NONE, class_="number")
    sign, word = verdict(change, p)
    parts: list[str | Html] = [el("span", f"{sign} {signed(change.value, key)}".strip(), class_=f"value {word[:6]}")]
    if change.low is not None and change.high is not None:
        parts += [" ", el("span", f"{signed(change.low, key)} to {signed(change.high, key)}", class_="span")]
    if p is not None:
        parts.append(el("span", f"{word}, {p_value(p)}", class_="p", title=f"{change.test}, Holm-corrected"))
    return el("td", parts, class_="number change", data_sort=change.value)


def _plain(value: float | None, key: str) -> Html:
    return el("td", number(value, key), class_="number", data_sort=value)


def _blind(line: Line) -> Html:
    if line.blind is None:
        return el("td", NONE, class_="number")
    value, title = line.blind
    return el("td", number(value, line.key), class_="number", data_sort=value, title=title)


def markdown(lines: Sequence[Line], names: Sequence[str]) -> str:
    """The lines as a Markdown table, for a README."""
    corrected = adjusted(lines)
    against = [f"{name} − {names[0]}" for name in names[1:]]
    heads = ["benchmark", "metric", *names, *against, "chance", "n"]
    rows = [heads, ["---", "---", *(["---:"] * (len(heads) - 2))]]
    for place, line in enumerate(lines):
        rows.append(
            [
                *line.labels,
                *(f"{number(m.value, line.key)} ({span(m, line.key)})" if m else NONE for m in line.metrics),
                *(_change_text(c, line.key, corrected.get((place, run))) for run, c in enumerate(line.changes)),
                number(line.chance, line.key),
                str(line.n),
            ]
        )
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def _change_text(change: Change | None, key: str, p: float | None) -> str:
    if change is None:
        return NONE
    return f"{verdict(change, p)[0]} {signed(change.value, key)}".strip()
