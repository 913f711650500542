"""Which pictures a model has seen: a result split into rows with seen pictures and without.

Pictures are known by their file's name without folders and suffix; COCO's editions number theirs alike, so that
COCO_val2014_000000391895.jpg and 000000391895.jpg are one picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from clipkit.data.members import PICTURES
from clipkit.errors import UserError
from clipkit.evaluation.compositional import Compositional
from clipkit.evaluation.result import Metric, Result, Task
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.stats import Resampler, mean_interval

FIELD = "meta.seen"
"""The breakdown: yes, no."""
_EDITION = re.compile(r"^coco_(train|val|test)20\d\d_")


def plain(name: str) -> str:
    """What a picture is known by."""
    return _EDITION.sub("", PurePosixPath(name.replace("\\", "/")).stem.lower())


def read_seen(place: str | Path) -> set[str]:
    """The pictures that a model was trained on.

    `place`: a text file with a name a line; a JSON file with names or objects that hold `image`, `filename`,
    `file_name` or `image_file` anywhere (Karpathy's splits, COCO's annotations); or shards, tars and folders of
    pictures. Raises UserError where it names none.
    """
    path = Path(place)
    if path.suffix == ".json" and path.is_file():
        try:
            names = [*_named(json.loads(path.read_text()))]
        except ValueError as error:
            raise UserError(f"--trained-on {place}: not readable as JSON: {error}") from None
    elif path.is_file() and path.suffix != ".tar":
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    else:
        paths = Roots({"trained on": place}).paths("trained on")
        names = [name for name in paths if name.rpartition(".")[2].lower() in PICTURES]
    if not names:
        raise UserError(f"--trained-on {place}: names no picture (lines of names, JSON with image names, or shards)")
    return {plain(name) for name in names}


def mark(task: Task, seen: Collection[str]) -> None:
    """Say of every row of a compositional benchmark whether one of its pictures is among the `seen` ones."""
    if not isinstance(task, Compositional):
        return
    for row in task.rows:
        row.meta["seen"] = "yes" if any(plain(picture.path) in seen for picture in row.pictures) else "no"
    task.benchmark.breakdowns = [*dict.fromkeys([*task.benchmark.breakdowns, FIELD])]


def split(result: Result, task: Task, seen: Collection[str]) -> None:
    """Put into the result how many rows are seen and, for kinds without rows of their own, the split itself."""
    names = {f"{picture.src}:{picture.path}": plain(picture.path) in seen for picture in task.pictures}
    if isinstance(task, Compositional):
        known = [row.meta["seen"] == "yes" for row in task.rows]
    else:
        known = [names.get(str(item["cluster"]), False) for item in result.items]
        result.breakdowns |= {FIELD: _by_seen(result, known)}
    result.details["leakage"] = {"seen": int(sum(known)), "rows": len(known)}


def _by_seen(result: Result, known: list[bool]) -> dict[str, dict[str, Metric]]:
    """Of the items of the headline's direction, those with seen and those with unseen pictures."""
    top = result.headline.partition("/")[0]
    directed = any(item["category"] == top for item in result.items)
    chosen = [not directed or item["category"] == top for item in result.items]
    credit = np.array([item["correct"] for item in result.items])
    resampler = Resampler([item["cluster"] for item in result.items])
    out = {}
    for value, wanted in (("yes", True), ("no", False)):
        mask = np.array([a and b == wanted for a, b in zip(chosen, known, strict=True)])
        if mask.any():
            found = mean_interval(credit, [(1.0, mask)], resampler)
            score = top if directed or "/" in result.headline else result.headline
            out[value] = {score: Metric(*found, int(mask.sum()))}
    return out


def _named(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if isinstance(value, str):
                if key in ("image", "filename", "file_name", "image_file"):
                    yield value
            else:
                yield from _named(value)
    elif isinstance(tree, list):
        for value in tree:
            if isinstance(value, str) and value.rpartition(".")[2].lower() in PICTURES:
                yield value
            else:
                yield from _named(value)
