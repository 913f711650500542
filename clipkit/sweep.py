"""Many methods under equal conditions: one start, the same batches, steps, optimizer and seeds; one table.

A method is what its config says of the objective, the teacher and what these need of data and model; everything else is
the base config's. What is there already is not done again, so an interrupted sweep goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clipkit import config as configuration
from clipkit.config import Config
from clipkit.errors import UserError
from clipkit.evaluation.result import Metric, Result
from clipkit.evaluation.run import evaluate
from clipkit.model.load import load
from clipkit.training.loop import train

CONDITIONS: dict[str, set[str]] = {
    "": {
        *("name", "out", "seed", "batch_size", "samples", "optim", "engine", "guard", "log_every", "log_samples"),
        *("save_every", "keep", "evaluate_every", "suite", "stop", "roots"),
    },
    "data": {
        *("train", "sources", "augment", "crop_scale", "decode", "workers", "lanes", "on_error"),
        "cache_image_features",
    },
    "model": {"name", "start", "embed_dim", "image", "text", "scale", "scale_max"},
}
"""By section: the settings that all methods share. All others belong to the method."""

Cell = tuple[float, float, float]
"""Value, and the ends of its 95 % interval."""


def run(
    methods: Sequence[str],
    *,
    base: str,
    out: Path,
    seeds: Sequence[int],
    settings: Sequence[str] = (),
    kinds: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and evaluate every method with every seed under `out`; returns what `sweep.json` there holds.

    `settings`: overrides of the base. `kinds`: methods that take negatives run once for each, with negatives of that
    kind (A+B: of these kinds) alone, as METHOD.KIND. A method that the base's data cannot serve gets the reason instead
    of figures. Raises UserError for a base without benchmarks, and for configs that do not exist.
    """
    console = Console(stderr=True)
    common = configuration.load(base, tuple(settings))
    if not common.suite:
        raise UserError(f"{base}: suite: name the benchmarks that the methods are compared on")
    if not seeds:
        raise UserError("a sweep needs at least one seed")
    configs = {Path(method).stem: configuration.load(method) for method in methods}
    if len(configs) < len(methods):
        raise UserError(f"methods are told apart by their files' names; two of these are alike: {', '.join(methods)}")
    configs = by_kind(configs, kinds)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {method: {"runs": []} for method in configs}
    began, done, total = time.perf_counter(), 0, len(configs) * len(seeds)
    for seed in seeds:
        for method, config in configs.items():
            left = (time.perf_counter() - began) / done * (total - done) / 60 if done else None
            console.rule(f"{method}, seed {seed}" + (f" (about {left:.0f} minutes left)" if left is not None else ""))
            try:
                found[method]["runs"].append(_one(on(config, common, out / method / str(seed), seed)))
            except UserError as error:
                console.print(f"{method}: {error}", style="yellow", highlight=False)
                found[method]["problem"] = str(error)
            done += 1
    text = json.dumps({"conditions": common.model_dump(mode="json"), "seeds": list(seeds), "methods": found}, indent=1)
    temporary = out / ".sweep.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, out / "sweep.json")
    tree = json.loads(text)
    (out / "sweep.md").write_text(markdown(tree))
    return tree


def by_kind(configs: dict[str, Config], kinds: Sequence[str]) -> dict[str, Config]:
    """Configs with negatives once for each of `kinds` (A+B: these), others as they are; all, where there are none."""
    found = {}
    for name, config in configs.items():
        if not kinds or not config.data.negatives:
            found[name] = config
            continue
        for group in kinds:
            data = config.data.model_copy(update={"negative_kinds": group.split("+")})
            found[f"{name}.{group}"] = config.model_copy(update={"data": data})
    return found


def on(method: Config, base: Config, folder: Path, seed: int) -> Config:
    """The method under the base's conditions, run in `folder`.

    Where both have negatives: as many as the base's, and of its kinds unless the method has kinds of its own.
    """
    tree = method.model_dump(mode="json")
    common = base.model_dump(mode="json")
    for section, names in CONDITIONS.items():
        mine, theirs = (tree[section], common[section]) if section else (tree, common)
        mine |= {name: theirs[name] for name in names}
    data = tree["data"]
    if data["negatives"] and base.data.negatives:
        data["negatives"] = base.data.negatives
        if data["negative_images"]:  # of any kind: only some have pictures
            data["negative_images"] = base.data.negatives
        elif not data["negative_kinds"]:
            data["negative_kinds"] = common["data"]["negative_kinds"]
    tree |= {"name": method.name, "out": str(folder), "seed": seed}
    return configuration.validate(tree, origin=f"{method.name} under the conditions of {base.name}")


def _one(config: Config) -> dict[str, Any]:
    """Figures of one run, trained and evaluated unless they lie there."""
    folder = config.run_folder
    path = folder / "figures.json"
    if path.is_file():
        return json.loads(path.read_text())
    train(config, resume=True)
    results = evaluate(
        load(folder), suite=config.suite, roots=config.roots, out=folder / "results", model_name=config.name
    )
    figures = {"seed": config.seed, "seconds": seconds(folder), "cells": cells(results)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(figures))
    os.replace(temporary, path)
    return figures


def seconds(folder: Path) -> float:
    """Seconds of training at the pace that the log's fastest tenth has.

    Evaluations and interruptions are left out, and most of what else the machine did meanwhile.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "samples_per_s" in line]
    pace = float(np.quantile([line["samples_per_s"] for line in timed], 0.9))
    return max(line["samples"] for line in timed) / pace


def cells(results: Sequence[Result]) -> dict[str, Cell]:
    """Column → figure: the mean of the zero-shot sets, retrieval, and every category of the compositional sets."""
    sets = [result.score for result in results if result.kind == "zeroshot"]
    found = {"zero-shot": _mean(sets)} if sets else {}
    several = sum(result.kind == "compositional" for result in results) > 1
    for result in results:
        if result.kind == "retrieval":
            found[f"{result.benchmark} {result.headline}"] = _cell(result.score)
        if result.kind == "compositional":
            found[f"{result.benchmark}"] = _cell(result.score)
            score = result.headline.partition("/")[0]
            for category, scores in sorted(result.by_category.items()):
                if score in scores:
                    found[f"{result.benchmark}: {category}" if several else category] = _cell(scores[score])
    return found


def _cell(metric: Metric) -> Cell:
    return metric.value, metric.low, metric.high


def _mean(metrics: Sequence[Metric]) -> Cell:
    """The mean of independent figures; deviations to either side add up in squares."""
    n = len(metrics)
    value = sum(m.value for m in metrics) / n
    below = sum((m.value - m.low) ** 2 for m in metrics) ** 0.5 / n
    above = sum((m.high - m.value) ** 2 for m in metrics) ** 0.5 / n
    return value, value - below, value + above


def read(path: Path) -> dict[str, Any]:
    """A `sweep.json`. Raises UserError if it is not one."""
    try:
        tree = json.loads(path.read_text())
        Config.model_validate(tree["conditions"])
        for method in tree["methods"].values():
            method["runs"]
        return tree
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the sweep.json of a clipkit sweep: {error}") from None


def columns(tree: dict[str, Any]) -> list[str]:
    """All columns of a sweep, in the order in which they first come up."""
    return list(
        dict.fromkeys(name for method in tree["methods"].values() for run in method["runs"] for name in run["cells"])
    )


def over_seeds(runs: Sequence[dict[str, Any]], column: str) -> Cell:
    """The mean over seeds, from the lowest to the highest end of their intervals."""
    found = [run["cells"][column] for run in runs]
    return sum(value for value, _, _ in found) / len(found), min(low for _, low, _ in found), max(h for *_, h in found)


def markdown(tree: dict[str, Any]) -> str:
    """What the methods had in common, and a row for each: percent with 95 % intervals, seconds of training."""
    names, common = columns(tree), Config.model_validate(tree["conditions"])
    seeds = ", ".join(map(str, tree["seeds"]))
    lines = [
        f"All: {common.steps:,} steps of {common.batch_size} pairs from {common.model.start or 'random weights'}, "
        f"{common.data.negatives} negatives a pair where a method takes any, learning rate {common.optim.lr:g}, "
        f"seeds: {seeds}.",
        "",
        "| method | " + " | ".join(names) + " | seconds |",
        "|---" + "|---:" * (len(names) + 1) + "|",
    ]
    for method, found in tree["methods"].items():
        runs = found["runs"]
        if not runs:
            reason = found["problem"].replace("\n", " ").replace("|", "\\|")
            lines.append(f"| `{method}` | not run: {reason} |" + " |" * len(names))
            continue
        shown = []
        for name in names:
            value, low, high = over_seeds(runs, name)
            shown.append(f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})")
        spent = sum(run["seconds"] for run in runs) / len(runs)
        lines.append(f"| `{method}` | " + " | ".join(shown) + f" | {spent:.0f} |")
    return "\n".join(lines) + "\n"
