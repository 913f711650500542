"""How hard each negative is for a model, written beside it: what `data.negative_policy` goes by. Axes: d embedding."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipkit.data.build import tracked
from clipkit.data.decode import read_picture
from clipkit.data.members import Sheet, Unreadable, picture_bytes, read_sheet
from clipkit.data.shards import Index, expand
from clipkit.errors import UserError
from clipkit.negatives.make import check_free, check_places, rewrite


class Model(Protocol):
    """What is asked of a model: unit vectors of pictures and of texts, n d."""

    def embed_images(self, images: Sequence[Any]) -> Any: ...

    def embed_texts(self, texts: Sequence[str]) -> Any: ...


@dataclass
class Scored:
    """What was done; `hard` counts negatives that the model takes for as good as their captions, or better, by kind."""

    shards: int = 0
    pairs: int = 0
    negatives: dict[str, int] = field(default_factory=dict)
    hard: dict[str, int] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, int, str]]:
        """(kind, negatives, share that the model does not tell from the caption)."""
        return [(k, n, f"{self.hard.get(k, 0) / n:.1%}") for k, n in sorted(self.negatives.items())]


def score_shards(
    model: Model,
    shards: str | Path | Sequence[str | Path],
    out: Path,
    *,
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool = True,
) -> Scored:
    """Write every shard again, to `out`, with a `score` for each negative; all else is copied byte for byte.

        score = cos(picture, negative) - cos(picture, caption)        the higher, the harder; above 0 it is taken

    Raises UserError for shards that are there, and for an unreadable pair.
    """
    paths, report = expand(shards), Scored()
    check_places(paths, out)
    if not overwrite:
        check_free(paths, out)
    for path in tracked(paths, "scoring negatives", len(paths)) if progress else paths:
        scores = iter(_scores(model, Index.load(path, progress=False), batch_size))
        rewrite(path, out / path.name, lambda members, scores=scores: _sheet(members, next(scores), report))
        report.shards += 1
    return report


Table = list[list[float]]
"""A score for each negative of each caption of a pair."""


def _scores(model: Model, index: Index, batch_size: int) -> list[Table]:
    """Of every pair of a shard, in order."""
    found: list[Table] = []
    ids = iter(range(len(index)))
    while some := [read_pair(index, id) for id in islice(ids, batch_size)]:
        pictures = np.asarray(model.embed_images([picture for picture, _ in some]))
        texts = [text for _, sheet in some for text in _texts(sheet)]
        embedded = iter(np.asarray(model.embed_texts(texts)))
        for vector, (_, sheet) in zip(pictures, some):
            own = [float(vector @ next(embedded)) for _ in sheet.captions]
            found.append([[float(vector @ next(embedded)) - base for _ in _of(sheet, c)] for c, base in enumerate(own)])
    return found


def _of(sheet: Sheet, caption: int) -> list[dict[str, Any]]:
    return sheet.negatives_of(caption)


def _texts(sheet: Sheet) -> Iterator[str]:
    """The captions, then all their negatives."""
    yield from sheet.captions
    for c in range(len(sheet.captions)):
        yield from (negative["text"] for negative in _of(sheet, c))


def read_pair(index: Index, id: int) -> tuple[Any, Sheet]:
    """A pair's picture and texts. Raises UserError where it cannot be read."""
    try:
        members = index.read(id)
        return read_picture(picture_bytes(members)[1]), read_sheet(members)
    except Unreadable as reason:
        raise UserError(f"{index.where(id)}: {reason}; mend the shard (clipkit shards check)") from None


def _sheet(members: dict[str, bytes], scores: Table, report: Scored) -> bytes:
    """KEY.json with the scores."""
    sheet = read_sheet(members)
    record = json.loads(members["json"]) if "json" in members else {}
    for group, values in zip(sheet.negatives, scores):
        for negative, value in zip(group, values):
            negative["score"] = round(value, 5)
            kind = str(negative.get("kind") or "")
            report.negatives[kind] = report.negatives.get(kind, 0) + 1
            report.hard[kind] = report.hard.get(kind, 0) + (value >= 0)
    report.pairs += 1
    return json.dumps(record | {"negatives": sheet.negatives}, ensure_ascii=False).encode()
