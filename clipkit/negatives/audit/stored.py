"""The negatives that shards hold, read into lists."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np

from clipkit.data.members import SHEETS, Sheet, Unreadable, read_sheet
from clipkit.data.shards import Index, Shard, expand
from clipkit.errors import UserError
from clipkit.negatives.make import LEDGER

UNNAMED = "no kind"
"""Kind of a negative that names none."""


@dataclass
class Stored:
    """Captions with a picture each, and negatives with the number of their caption, a kind and a source each.

    `made` counts negatives, `dropped` candidates by kind and reason, as the ledgers of `negatives make` have them.
    """

    captions: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    made: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def owner(self) -> np.ndarray:
        """The number of each negative's caption."""
        return np.array(self.owners, np.int64)

    def of_kind(self, kind: str | None) -> np.ndarray:
        """Numbers of the negatives of a kind, of all for None."""
        return np.array([n for n, own in enumerate(self.kinds) if kind in (None, own)], np.int64)

    def kinds_by_count(self) -> list[str]:
        """The kinds, the most frequent first."""
        return [kind for kind, _ in Counter(self.kinds).most_common()]

    def without(self, gone: np.ndarray) -> Stored:
        """The same captions with fewer negatives."""
        left = np.flatnonzero(~gone)
        picked = {name: [getattr(self, name)[n] for n in left] for name in ("texts", "owners", "kinds", "sources")}
        return replace(self, **picked)

    def counts(self, all_kinds: bool, kind: str) -> tuple[int, int]:
        """Negatives made and candidates dropped, of a kind or of all."""
        if all_kinds:
            return self.made.total(), sum(reasons.total() for reasons in self.dropped.values())
        return self.made[kind], self.dropped.get(kind, Counter()).total()

    def add(self, sheet: Sheet, picture: str) -> None:
        """A picture's captions that say something and their negatives, in the order of the sheet."""
        for c in sheet.usable():
            self.captions.append(sheet.captions[c])
            self.pictures.append(picture)
            for negative in sheet.negatives_of(c):
                self.texts.append(negative["text"])
                self.owners.append(len(self.captions) - 1)
                self.kinds.append(str(negative.get("kind") or UNNAMED))
                self.sources.append(str(negative.get("source") or ""))


def read_stored(shards: str | Path | Sequence[str | Path], *, sample: int | None = None, seed: int = 0) -> Stored:
    """All negatives, or those of `sample` pairs drawn by `seed`; unreadable pairs are passed over.

    Raises UserError when there is none.
    """
    stored, paths = Stored(), expand(shards)
    index = Index.load(shards, progress=False)
    count = len(index)
    ids = sorted(Random(seed).sample(range(count), min(sample, count))) if sample else range(count)
    for id in ids:
        try:
            sheet = read_sheet(index.read(id, SHEETS))
        except Unreadable:
            continue
        stored.add(sheet, index.key(id) if sheet.group is None else f"group {sheet.group}")
    for report in map(_ledger, paths):
        stored.made.update(report.get("kinds", {}))
        for kind, reasons in report.get("drops", {}).items():
            stored.dropped.setdefault(kind, Counter()).update(reasons)
    if not stored.texts:
        raise UserError(f"{shards}: no negatives there; make some first (clipkit negatives make)")
    return stored


def _ledger(path: Shard) -> dict[str, dict]:
    file = path.parent / LEDGER / f"{path.name}.json" if isinstance(path, Path) else None
    return json.loads(file.read_text())["report"] if file and file.is_file() else {}


def each_negative(sheet: Sheet) -> Iterator[tuple[int, int]]:
    """(caption, place) of the negatives in the order in which `Stored.add` takes them."""
    for c in sheet.usable():
        for place in range(len(sheet.negatives_of(c))):
            yield c, place
