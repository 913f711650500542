"""The lines of the report's tables: a metric for every run, with what it is to be judged against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from clipkit.evaluation.report.paired import Change
from clipkit.evaluation.report.runs import Compared
from clipkit.evaluation.report.words import is_rank, label, plain
from clipkit.evaluation.result import Metric, Result
from clipkit.evaluation.stats import holm

MOST_TESTED = 60
"""Categories beyond which (a thousand classes) no test by category would find anything after correction."""


@dataclass
class Line:
    """One line of a table. `metrics`: of every run; `changes`: of every run but the first, against the first."""

    labels: tuple[str, ...]
    key: str
    metrics: list[Metric | None]
    changes: list[Change | None]
    blind: tuple[float, str] | None = None
    """The best score without understanding, and whose it is."""
    published: dict[str, float] = field(default_factory=dict)
    anchor: str = ""
    note: str = ""

    @property
    def chance(self) -> float | None:
        """What guessing gives."""
        return next((m.chance for m in self.metrics if m), None)

    @property
    def n(self) -> int:
        """Rows the numbers rest on."""
        return max((m.n for m in self.metrics if m), default=0)


def adjusted(lines: Sequence[Line]) -> dict[tuple[int, int], float]:
    """(line, change) -> p, Holm-corrected over all tests of these lines."""
    found = [(n, c, change) for n, line in enumerate(lines) for c, change in enumerate(line.changes) if change]
    p_values = {f"{n} {c}": change.p for n, c, change in found if change.p is not None}
    corrected = holm(p_values)
    return {(n, c): corrected[f"{n} {c}"] for n, c, _ in found if f"{n} {c}" in corrected}


def headlines(benchmarks: Sequence[Compared]) -> list[Line]:
    """The lines a reader looks at first: headline metrics, pooled aggregates, both directions of retrieval."""
    return [_metric(b, key, (b.any.title, label(key))) for b in benchmarks for key in _first(b.any)]


def metrics(benchmark: Compared) -> list[Line]:
    """All metrics of a benchmark, the headline's score first."""
    keys = dict.fromkeys(key for result in benchmark.results if result for key in result.metrics)
    keys = sorted(keys, key=lambda key: key.partition("/")[0] != _score(benchmark.any))
    return [_metric(benchmark, key, (label(key),)) for key in keys]


def categories(benchmark: Compared) -> list[Line]:
    """The headline's score in every category; where a category has none, its first score."""
    names = _categories(benchmark)
    return [_category(benchmark, name, score, len(names) <= MOST_TESTED) for name, score in names.items()]


def other_scores(benchmark: Compared) -> list[Line]:
    """Every further score of every category that says something else than the main one."""
    lines = []
    for name, main in _categories(benchmark).items():
        first = _category(benchmark, name, main, tested=False)
        scores = dict.fromkeys(s for result in benchmark.results if result for s in result.by_category.get(name, {}))
        every = [_category(benchmark, name, score, tested=False) for score in scores]
        lines += [line for line in every if line.metrics != first.metrics]
    return lines


def breakdown(benchmark: Compared, name: str) -> list[Line]:
    """The headline's score for every value of a row field, as `meta.seed`."""
    tables = [result.breakdowns.get(name, {}) if result else {} for result in benchmark.results]
    score, lines = _main(_score(benchmark.any), [scores for table in tables for scores in table.values()]), []
    for value in dict.fromkeys(value for table in tables for value in table):
        found = [table.get(value, {}).get(score) for table in tables]
        lines.append(Line((value or "(none)", plain(score)), score, found, _differences(found)))
    return [line for line in lines if any(line.metrics)]


def _categories(benchmark: Compared) -> dict[str, str]:
    """Category -> its main score."""
    tables = [result.by_category for result in benchmark.results if result]
    wanted = _score(benchmark.any)
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: _main(wanted, [table[name] for table in tables if name in table]) for name in names}


def _first(result: Result) -> list[str]:
    score = _score(result)
    pooled = [name for name, spec in result.about.get("aggregates", {}).items() if isinstance(spec, list)]
    both = ["t2i/r1", "i2t/r1"] if result.kind == "retrieval" else []
    keys = [result.headline, *(f"{score}/{name}" for name in pooled), *both]
    return [key for key in dict.fromkeys(keys) if key in result.metrics]


def _metric(benchmark: Compared, key: str, labels: tuple[str, ...]) -> Line:
    found = [result.metrics.get(key) if result else None for result in benchmark.results]
    return Line(
        labels,
        key,
        found,
        [pairing.metric(key) if pairing else None for pairing in benchmark.pairings],
        _blind(benchmark, key, lambda baseline: baseline["metrics"].get(key)),
        _published(benchmark.any, key),
        benchmark.anchor,
        _members(benchmark.any, key),
    )


def _category(benchmark: Compared, name: str, score: str, tested: bool) -> Line:
    found = [result.by_category.get(name, {}).get(score) if result else None for result in benchmark.results]
    tests = [pairing.category(name, score) if pairing and tested else None for pairing in benchmark.pairings]
    return Line(
        (plain(name), plain(score)),
        score,
        found,
        [test or change for test, change in zip(tests, _differences(found))],
        _blind(benchmark, score, lambda baseline: baseline["by_category"].get(name, {}).get(score)),
        _published(benchmark.any, f"{score}/{name}"),
    )


def _differences(found: Sequence[Metric | None]) -> list[Change | None]:
    first, *others = found
    return [Change(other.value - first.value) if first and other else None for other in others]


def _blind(benchmark: Compared, key: str, value: Callable[[dict[str, Any]], float | None]) -> tuple[float, str] | None:
    baselines = [b for result in benchmark.results if result for b in result.baselines.values()]
    scored = [(found, b["title"]) for b in baselines if (found := value(b)) is not None]
    return max(scored, default=None) if not is_rank(key) else None


def _published(result: Result, key: str) -> dict[str, float]:
    return {entry["model"]: entry["value"] for entry in result.about.get("reference", []) if entry["metric"] == key}


def _members(result: Result, key: str) -> str:
    """What a named aggregate is made of."""
    spec = result.about.get("aggregates", {}).get(key.rpartition("/")[2])
    if isinstance(spec, list):
        return f"rows of {', '.join(spec)}"
    if spec:
        if spec.get("together"):
            return f"right only with all rows of the same {spec['together']}"
        return f"mean of {', '.join(spec['mean'])}" if spec["mean"] else f"mean over {spec['over']}"
    return ""


def _score(result: Result) -> str:
    return result.headline.partition("/")[0]


def _main(wanted: str, tables: Sequence[dict[str, Metric]]) -> str:
    """The wanted score, or the first where the tables (score -> metric) do not have it."""
    scores = dict.fromkeys(score for table in tables for score in table)
    return wanted if wanted in scores else next(iter(scores))
