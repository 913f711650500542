"""Captions and pictures that come more than once, found by 64-bit hashes: 8 bytes a caption, 26 a pair."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from clipkit.data.members import read_sheet
from clipkit.data.shards import Index
from clipkit.errors import UserError

EXAMPLES = 5
"""Repeated things that are named, the most frequent first."""
NAMED = 3
"""Places that are named of each."""


def hash_of(data: bytes | str) -> int:
    """64 bits that name a picture or a text."""
    data = data.encode(errors="replace") if isinstance(data, str) else data
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


class Repeats:
    """Hashes by pair. Two in ten million captions are equal by accident with a chance of one in 400,000."""

    def __init__(self) -> None:
        self._ids, self._groups, self._pictures, self._texts = (array("q"), array("q"), array("Q"), array("Q"))
        self._counts = array("H")

    def add(self, ids: Sequence[int], groups: Sequence[int], pictures: Sequence[int], texts: list[list[int]]) -> None:
        """Pairs: their ids, the numbers of their groups (0: none), hashes of their pictures and of their captions."""
        self._ids.extend(ids)
        self._groups.extend(groups)
        self._pictures.extend(pictures)
        for hashes in texts:
            if len(hashes) >= 1 << 16:
                raise UserError(f"pair {ids[texts.index(hashes)]}: {len(hashes)} captions, more than can be counted")
            self._counts.append(len(hashes))
            self._texts.extend(hashes)

    @property
    def pairs(self) -> int:
        """Pairs added."""
        return len(self._ids)

    def groups(self) -> dict[str, Any]:
        """Named groups and how many pairs they hold."""
        named = np.frombuffer(self._groups, dtype=np.int64)
        sizes = np.unique(named[named != 0], return_counts=True)[1]
        return {"count": len(sizes), "pairs": int(sizes.sum()), "largest": int(sizes.max(initial=0))}

    def captions(self, index: Index) -> dict[str, Any]:
        """How many captions repeat another one, how many say what a caption of another pair says, and examples."""
        hashes = np.frombuffer(self._texts, dtype=np.uint64)
        owners = np.repeat(np.arange(self.pairs), np.frombuffer(self._counts, dtype=np.uint16))
        runs = _Runs(hashes)
        elsewhere = runs.spread_over(owners)
        out: dict[str, Any] = {"distinct": runs.distinct, "repeated": len(hashes) - runs.distinct}
        out |= {"shared_by_pairs": int(runs.lengths[elsewhere].sum()), "examples": []}
        for places in runs.longest(elsewhere):
            pairs = [self._ids[owner] for owner in dict.fromkeys(owners[places].tolist())]
            text = _text_of(index, pairs[0], int(hashes[places[0]]))
            out["examples"].append({"text": text, "times": len(places), "where": _named(index, pairs)})
        return out

    def pictures(self, index: Index) -> dict[str, Any]:
        """How many pictures repeat another one byte for byte, how many of those in no common group, and examples."""
        hashes = np.frombuffer(self._pictures, dtype=np.uint64)
        groups = np.frombuffer(self._groups, dtype=np.int64)
        runs = _Runs(hashes)
        apart = runs.several & (runs.spread_over(groups) | (groups[runs.first] == 0))
        out: dict[str, Any] = {"distinct": runs.distinct, "repeated": len(hashes) - runs.distinct}
        out |= {"without_common_group": int(runs.lengths[apart].sum()), "examples": []}
        for places in runs.longest(runs.several):
            pairs = [self._ids[place] for place in places.tolist()]
            out["examples"].append({"times": len(places), "where": _named(index, pairs)})
        return out


class _Runs:
    """Equal values side by side. `order` sorts them; of the runs: where they start in it, and their lengths."""

    def __init__(self, values: np.ndarray):
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        self.starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self.lengths = np.diff(self.starts, append=len(values))
        self.distinct = len(self.starts)
        self.several = self.lengths > 1

    @property
    def first(self) -> np.ndarray:
        """The first place of each run."""
        return self.order[self.starts]

    def spread_over(self, owners: np.ndarray) -> np.ndarray:
        """Which runs have more than one owner."""
        ordered = owners[self.order]
        return np.minimum.reduceat(ordered, self.starts) != np.maximum.reduceat(ordered, self.starts)

    def longest(self, which: np.ndarray) -> Iterator[np.ndarray]:
        """Places of the longest of some runs."""
        runs = np.flatnonzero(which)
        for run in runs[np.argsort(-self.lengths[runs], kind="stable")[:EXAMPLES]]:
            yield np.sort(self.order[self.starts[run] : self.starts[run] + self.lengths[run]])


def _named(index: Index, pairs: list[int]) -> list[str]:
    return [index.where(pair) for pair in pairs[:NAMED]]


def _text_of(index: Index, pair: int, hash: int) -> str:
    """The caption of `pair` with this hash."""
    return next(text for text in read_sheet(index.read(pair)).captions if hash_of(text) == hash)
