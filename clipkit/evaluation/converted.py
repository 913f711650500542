"""What converters share: rows as they go into a file, and readers of the forms annotations come in."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from clipkit.data.files import Files
from clipkit.errors import UserError

COCO = "coco_val2017"


@dataclass
class Converted:
    """Rows as they go into OUT/NAME.jsonl, drawn pictures (OUT/NAME.tar), and how many rows were left out and why."""

    rows: list[dict[str, Any]]
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)


def one_picture(id: str, category: str, src: str, path: str, texts: list[str], match: list[int]) -> dict[str, Any]:
    """A picture and its texts, right or wrong (1 × k); rows of one picture are one cluster."""
    images = [{"src": src, "path": path}]
    return {"id": id, "category": category, "cluster": path, "images": images, "texts": texts, "match": [match]}


def two_by_two(id: str, category: str, cluster: str, src: str, paths: list[str], texts: list[str]) -> dict[str, Any]:
    """Winoground's form: the first text is right of the first picture, the second of the second."""
    return several_pictures(id, category, cluster, src, paths) | {"texts": texts, "match": [[1, 0], [0, 1]]}


def choice_of_picture(id: str, category: str, cluster: str, src: str, paths: list[str], text: str) -> dict[str, Any]:
    """A text is right of the first picture and wrong of the others."""
    return several_pictures(id, category, cluster, src, paths) | {
        "texts": [text],
        "match": [[int(not number)] for number in range(len(paths))],
    }


def several_pictures(id: str, category: str, cluster: str, src: str, paths: list[str]) -> dict[str, Any]:
    """The beginning of a row with several pictures of one source."""
    images = [{"src": src, "path": path} for path in paths]
    return {"id": id, "category": category, "cluster": cluster, "images": images}


def components(edges: list[tuple[str, str]]) -> dict[str, str]:
    """Node -> the name of its connected component."""
    name: dict[str, str] = {}
    for a, b in edges:
        keep, drop = name.setdefault(a, a), name.setdefault(b, b)
        name |= {node: keep for node, component in name.items() if component == drop}
    return name


def named(files: Files, ending: str) -> bytes:
    """The one file whose path ends in `ending` (whole path parts). Raises UserError when there is none, or several."""
    wanted = PurePosixPath(ending).parts
    names = [name for name in files if PurePosixPath(name).parts[-len(wanted) :] == wanted]
    if len(names) != 1:
        raise UserError(f"the source should hold one file {ending}, found {names or 'none'}")
    return files[names[0]]


def json_named(files: Files, ending: str) -> Any:
    """The content of the one JSON file whose path ends so."""
    return json.loads(named(files, ending))


def lines_named(files: Files, ending: str) -> list[dict[str, Any]]:
    """The records of the one JSONL file whose path ends so."""
    return [json.loads(line) for line in named(files, ending).decode().splitlines() if line.strip()]


def table(data: bytes, where: str, columns: set[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header. Raises UserError naming the columns it lacks."""
    reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    if lacking := columns - {*(reader.fieldnames or ())}:
        raise UserError(f"{where}: no column {', '.join(sorted(lacking))}; it has {reader.fieldnames or 'none'}")
    return list(reader)
