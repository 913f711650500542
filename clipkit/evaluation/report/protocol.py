"""What was run exactly: versions, hashes, coverage, ties; and where two runs were not measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clipkit.evaluation.report.runs import Compared
from clipkit.evaluation.report.tables import table
from clipkit.evaluation.report.words import NONE, listed
from clipkit.evaluation.result import Result
from clipkit.html import Html, el, join


def section(benchmarks: Sequence[Compared], names: Sequence[str]) -> Html:
    """A line for every result."""
    heads = ["benchmark", "run", "model", "version", "n", "coverage", "ties", "tie rate", "protocol"]
    rows = [
        [*_line(result, names[run]), _hashes(result)]
        for benchmark in benchmarks
        for run, result in enumerate(benchmark.results)
        if result
    ]
    return join(warnings(benchmarks), table("Protocol of every result", heads, rows))


def warnings(benchmarks: Sequence[Compared]) -> Html | None:
    """Benchmarks that the runs did not do alike, or not in full."""
    said = []
    for benchmark in benchmarks:
        results = [result for result in benchmark.results if result]
        unlike = [name for name in _ways(results[0]) if len({str(_ways(result).get(name)) for result in results}) > 1]
        if unlike:
            said.append(
                f"{benchmark.any.title}: the runs differ in {listed(unlike)}; only rows both have are compared."
            )
        if partial := [result.coverage["share"] for result in results if result.coverage.get("share", 1) < 1]:
            said.append(
                f"{benchmark.any.title}: covers {100 * min(partial):.1f} % of the benchmark; pictures are missing."
            )
    return el("ul", (el("li", f"⚠ {line}") for line in said), class_="warnings") if said else None


def _ways(result: Result) -> Mapping[str, object]:
    return {"version": result.version, "rows": result.n, "tie rule": result.tie.get("rule")} | result.protocol


def _line(result: Result, run: str) -> list[str | int]:
    ties = f"{result.tie.get('policy', NONE)}: {result.tie.get('rule', NONE)}"
    share, rate = result.coverage.get("share"), result.tie.get("rate")
    covered = NONE if share is None else f"{100 * share:.1f} %"
    tied = NONE if rate is None else f"{100 * rate:.1f} %"
    return [result.title, run, result.model or NONE, result.version, result.n, covered, ties, tied]


def _hashes(result: Result) -> Html:
    """Hashes by their beginning, all of them on pointing."""
    return join(
        el(
            "div",
            f"{key.removesuffix('_sha256').replace('_', ' ')} ",
            el("code", value[:12], title=value),
            class_="hash",
        )
        for key, value in result.protocol.items()
    )
