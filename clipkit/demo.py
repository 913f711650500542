"""The whole chain on the picture world: build, negatives, train `clip` and `degla` from one start, evaluate, report.

Everything lies under one folder; what is there already is not done again, so an interrupted demo goes on.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clipkit import config as configuration
from clipkit.data.world.build import build_world
from clipkit.evaluation.report import write_report
from clipkit.evaluation.result import Result
from clipkit.evaluation.run import evaluate
from clipkit.model.load import load
from clipkit.negatives.make import make
from clipkit.training.loop import train

RUNS = ("clip", "degla")
NEGATIVES = ("swap_noun_phrases", "replace_relations", "swap_adjectives")
"""Kinds of negatives: two for what lies where, one for who has what. Swapped nouns would give themselves away by their
colours, and places be learned late (docs/log.md). Plain CLIP finds replaced words by itself."""
USUAL = 3
"""Captions that hold any two neighbouring words of a negative, at least: others give themselves away (docs/log.md)."""
ZEROSHOT = ("world_object", "world_shape", "world_colour", "world_texture")


def run(out: Path, *, pictures: int = 14_000, settings: tuple[str, ...] = ()) -> Path:
    """Carry out the demo under `out`; returns the path of the report. `settings`: overrides for all three runs."""
    console = Console(stderr=True)
    began = time.perf_counter()
    if not (out / "world").is_dir():
        console.rule("world")
        build_world(out / "world", pictures=pictures)
    console.rule("negatives")
    make([out / "world/train-*.tar"], out / "shards", kinds=NEGATIVES, per_kind=2, usual=USUAL, overwrite=True)
    for name in ("start", *RUNS):
        console.rule(f"train {name}")
        _train(out, name, settings)
    results = {}
    for name in RUNS:
        console.rule(f"evaluate {name}")
        results[name] = _evaluate(out, name)
    report = write_report([(name, out / "runs" / name) for name in RUNS], out / "report.html")
    Console().print(table(results))
    console.print(f"report: {report}   ({(time.perf_counter() - began) / 60:.1f} minutes)")
    return report


def _train(out: Path, name: str, settings: tuple[str, ...]) -> None:
    """The packaged config world_NAME, with its paths under `out`; resumed where it was interrupted."""
    places = [f"data.train=[{out}/shards/train-*.tar]", f"out={out}/runs/{{name}}"]
    if name != "start":
        places.append(f"model.start={out}/runs/start")
    train(configuration.load(f"world_{name}", [*places, *settings]), resume=True)


def _evaluate(out: Path, name: str) -> list[Result]:
    folder = out / "runs" / name
    roots = {"world": out / "world"}
    return evaluate(load(folder), suite="world", roots=roots, out=folder / "results", model_name=name)


def table(results: dict[str, list[Result]]) -> Table:
    """The demo's answer: what negatives and distillation change, and what they leave alone."""
    shown = Table(title="three evaluation sets each (mean, 95 % interval), percent")
    shown.add_column("")
    for name in results:
        shown.add_column(name, justify="right")
    by_name = {name: {result.benchmark: result for result in found} for name, found in results.items()}
    for label, benchmark, metric in ROWS:
        metrics = [by_name[name][benchmark].metrics[metric or by_name[name][benchmark].headline] for name in results]
        shown.add_row(label, *(f"{100 * m.value:.1f} ({100 * m.low:.1f}-{100 * m.high:.1f})" for m in metrics))
    return shown


ROWS = (
    ("compositional: swap", "world", "accuracy/swap"),
    ("compositional: replace", "world", "accuracy/replace"),
    ("compositional: add", "world", "accuracy/add"),
    ("compositional: all kinds", "world", ""),
    *((f"zero-shot: {name.removeprefix('world_')}", name, "") for name in ZEROSHOT),
    ("retrieval: text to image R@1", "world_retrieval", "t2i/r1"),
)
"""Label, benchmark, metric (empty: the headline)."""
