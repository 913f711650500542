"""`evaluate`: a model and some benchmarks in; results, JSON files and a table out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from clipkit.errors import UserError
from clipkit.evaluation import benchmark as data
from clipkit.evaluation import compositional, leakage, retrieval, robustness, zeroshot
from clipkit.evaluation.benchmark import Benchmark
from clipkit.evaluation.embed import Embedder, Model
from clipkit.evaluation.result import Result, Task
from clipkit.evaluation.roots import EVERYWHERE, Roots
from clipkit.evaluation.stats import detectable
from clipkit.evaluation.store import Store

PREPARE: dict[str, Callable[..., Task]] = {
    "compositional": compositional.prepare,
    "zeroshot": zeroshot.prepare,
    "retrieval": retrieval.prepare,
    "robustness": robustness.prepare,
}
"""Kind -> how its data is found and read; the task it returns scores itself."""


ROOTS = f"--root SOURCE=FOLDER_OR_TAR (SOURCE '{EVERYWHERE}': a folder with all of them)"
MISSING = "; --allow-missing evaluates what is there and reports the coverage"


def evaluate(
    model: Model,
    suite: str | None = None,
    benchmarks: Sequence[str | Path] | None = None,
    roots: Mapping[str, str | Path] | None = None,
    out: str | Path | None = None,
    allow_missing: bool = False,
    tie: Literal["official", "strict", "half", "lenient"] = "official",
    model_name: str = "",
    trained_on: str | Path | None = None,
    *,
    batch_size: int = 64,
    show: bool = True,
    cache: bool | str | Path = False,
) -> list[Result]:
    """Run a suite, or benchmarks by name or YAML path, and return one Result each.

    `roots`: source -> folder, tar or glob of tars; under "*" a folder that holds the others. `out`: folder for
    <benchmark>.json. Every picture and text is embedded once, shared over the ranks; every rank gets the results, the
    first one writes and (`show`) prints. `cache`: keep embeddings on disk, in that folder or (True) in
    $CLIPKIT_CACHE/embeddings, so that a call that was interrupted, or is made again, goes on from there. `trained_on`:
    names of pictures the model has seen (leakage.py); results are then split into rows with such pictures and without.
    Raises one UserError for everything that is missing, unless `allow_missing`.
    """
    from clipkit.distributed import is_main

    places = Roots(roots)
    tasks = _prepared(_names(suite, benchmarks), places, allow_missing, f"{ROOTS}{'' if allow_missing else MISSING}")
    seen = leakage.read_seen(trained_on) if trained_on else set()
    store = Store(model, None if cache is True else Path(cache)) if cache else None
    embedder = Embedder(model, places, batch_size=batch_size, progress=show, store=store)
    # All at once: one progress bar with an honest time left, and like lengths together across benchmarks.
    embedder.pictures([picture for task in tasks for picture in task.pictures])
    embedder.texts([text for task in tasks for text in task.texts])
    results = []
    for task in tasks:
        if trained_on:
            leakage.mark(task, seen)
        results.append(task.score(embedder, tie))
        if trained_on:
            leakage.split(results[-1], task, seen)
    for result in results:
        result.model = model_name
        if out is not None and is_main():
            result.save(out)
    if show and is_main():
        print_results(results)
    return results


def check_suite(suite: str, roots: Mapping[str, str | Path]) -> None:
    """Read what a run's evaluations will, before it trains. Raises the one UserError that the first of them would."""
    where = f"roots={{SOURCE: FOLDER_OR_TAR}} (SOURCE '{EVERYWHERE}': a folder with all of them)"
    try:
        _prepared(_names(suite, None), Roots(roots), False, where)
    except UserError as error:
        raise UserError(f"suite: {error}") from None


def _names(suite: str | None, benchmarks: Sequence[str | Path] | None) -> list[str | Path]:
    names: list[str | Path] = [*(data.suite(suite) if suite else []), *(benchmarks or [])]
    if not names:
        raise UserError("nothing to evaluate: name a suite (eval/suites.yaml) or benchmarks")
    return list(dict.fromkeys(names))


def _prepared(names: list[str | Path], roots: Roots, allow_missing: bool, remedy: str) -> list[Task]:
    """All benchmarks, read. Raises one UserError for everything that is missing; `remedy` says how to give roots."""
    tasks: list[Task] = []
    problems = []
    for benchmark in [data.load(name) for name in names]:
        roots.sources.update(benchmark.sources)
        try:
            tasks.append(PREPARE[benchmark.kind](benchmark, roots, allow_missing))
        except UserError as error:
            problems.append(f"{benchmark.name}: {error}")
    if problems:
        raise UserError("\n".join([*problems, f"say where sources lie: {remedy}"]))
    return tasks


@dataclass(frozen=True)
class Survey:
    """What there is of a benchmark: rows that count, their pictures and how many are missing, texts."""

    rows: int
    pictures: int
    missing: int
    texts: int
    problem: str = ""
    """What is missing and what that is."""


def survey(benchmark: Benchmark, roots: Roots) -> Survey:
    """Read a benchmark and count; pictures that rows name may be missing. Raises UserError as reading does."""
    if benchmark.kind != "compositional":
        task = PREPARE[benchmark.kind](benchmark, roots)
        pictures = len({picture._replace(change="") for picture in task.pictures})
        return Survey(pictures, pictures, 0, len(set(task.texts)))
    rows = [row for row in data.read_rows(benchmark, roots) if row.valid]
    pictures, absent, problem = compositional.look_for_pictures(rows, roots)
    texts = {text for row in rows for text in row.texts}
    return Survey(len(rows), len(pictures), len(absent), len(texts), problem)


def print_results(results: Sequence[Result], console: Console | None = None) -> None:
    """A table for people: headline and aggregates with intervals, chance and the best blind guess, in percent.

    Below it, of every headline, the smallest difference to another model that would be found four times of five.
    """
    console = console or Console()
    table = Table(title=results[0].model or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("benchmark · metric", no_wrap=True)
    for name in ("value", "95 %", "chance", "blind", "ties", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        table.add_row(f"[bold]{result.benchmark}[/bold]")
        for key in _shown(result):
            table.add_row(f"  {key}", *_cells(result, key))
    console.print(table)
    found = [
        f"{result.benchmark} {100 * detectable(result.score.low, result.score.high):.1f}"
        for result in results
        if not result.headline.endswith("rank")
    ]
    if found:
        console.print(f"smallest difference that would be found, in points: {', '.join(found)}")
    for result in results:
        if "leakage" in result.details:
            console.print(_leaked(result))
        if result.coverage["share"] < 1:
            missing = ", ".join(f"{count} of {src}" for src, count in result.coverage["missing"].items())
            console.print(f"{result.benchmark}: coverage {result.coverage['share']:.1%}, missing pictures: {missing}")


def _leaked(result: Result) -> str:
    """How many rows have seen pictures, and the headline's score with and without."""
    found, score = result.details["leakage"], result.headline.partition("/")[0]
    split = result.breakdowns[leakage.FIELD]
    said = [
        f"{'seen' if value == 'yes' else 'unseen'} {100 * scores[score].value:.1f} (n={scores[score].n})"
        for value, scores in split.items()
        if score in scores
    ]
    return f"{result.benchmark}: {found['seen']} of {found['rows']} rows have seen pictures; {', '.join(said)}"


def _shown(result: Result) -> list[str]:
    """Headline first, then the same score's aggregates and every other score's micro."""
    score = result.headline.partition("/")[0]
    same = [key for key in result.metrics if result.kind != "compositional" or key.startswith(f"{score}/")]
    others = [key for key in result.metrics if key.endswith("/micro")]
    return list(dict.fromkeys([result.headline, *same, *others]))


def _cells(result: Result, key: str) -> list[str]:
    metric = result.metrics[key]
    blind = [b["metrics"][key] for b in result.baselines.values() if key in b["metrics"]]
    ties = result.tie["rate"] if key == result.headline else None
    return [
        _number(metric.value, key),
        f"{_number(metric.low, key)}–{_number(metric.high, key)}",
        "" if metric.chance is None else _number(metric.chance, key),
        _number(max(blind), key) if blind else "",
        "" if ties is None else f"{100 * ties:.1f}",
        str(metric.n),
    ]


def _number(value: float, key: str) -> str:
    if key.endswith("rank"):
        return f"{value:.1f}" if key.endswith("of_rank") else f"{value:.0f}"
    return f"{100 * value:.1f}"
