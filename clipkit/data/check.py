"""What is wrong with shards, before training finds out: scan them, read every pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from clipkit.data.indexing import write_beside
from clipkit.data.members import Unreadable, picture_bytes, read_sheet
from clipkit.data.shards import Index, Shard, Summary, expand, summarise
from clipkit.data.stored import MEMBER, read_rows
from clipkit.errors import UserError

EXAMPLES = 5
"""Samples named for each reason."""
AHEAD = 64
"""Pairs a worker that are handed out at once."""
STRUCTURE = ("duplicate key", "missing caption", "missing picture", "truncated tar", "not a tar", "no pairs")
"""Reasons that concern what is not a pair of the index at all."""


def index_shards(
    patterns: str | Path | Sequence[str | Path], progress: bool = True, workers: int = 0, beside: bool = False
) -> dict[str, Any]:
    """Scan the shards (once; kept in the cache) → {"samples", "fingerprint", "shards": {path: samples}}.

    `workers` processes do so (0: this one). With `beside`, NAME.tar.index.json is written beside each shard, too.
    """
    index = Index.load(patterns, on_error="skip", progress=progress, workers=workers)
    if beside:
        write_beside(index.shards)
    counts = {str(shard): count for shard, count in zip(index.shards, index.counts)}
    return {"samples": len(index), "fingerprint": index.fingerprint, "shards": counts}


def check_shards(
    patterns: str | Path | Sequence[str | Path], progress: bool = True, workers: int = 2
) -> dict[str, Any]:
    """Decode every picture and read every caption of the shards, as training does; the same for any `workers`.

    → {"samples", "usable", "reasons": {reason: count}, "shards": {path: {"samples", "problems": {reason: count}}},
    "examples": {reason: [[shard/key, whole reason], ...]}}; JSON-able. A shard that is no tar at all is counted, too.
    """
    from clipkit.data.build import tracked

    paths = expand(patterns)
    found = _Found()
    whole: list[tuple[Shard, Summary]] = []
    for path in tracked(paths, "indexing shards", len(paths)) if progress else paths:
        summary = found.structure(path)
        if summary and summary.count:
            whole.append((path, summary))
    index = Index([path for path, _ in whole], [summary for _, summary in whole])
    with ThreadPoolExecutor(workers) as pool:  # decoding lets other threads run
        failures = _failures(index, pool, workers)
        for id, reason in tracked(failures, "reading pairs", len(index)) if progress else failures:
            if reason:
                found.problem(index.shards[index.locate(id)[0]], index.key(id), reason)
    return found.report()


@dataclass
class _Found:
    """Problems, counted as they come."""

    shards: dict[Shard, int] = field(default_factory=dict)
    problems: dict[Shard, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[list[str]]] = field(default_factory=dict)

    def structure(self, path: Shard) -> Summary | None:
        """Note what the scan of a shard says."""
        self.shards[path], self.problems[path] = 0, Counter()
        try:
            summary = summarise(path)
        except UserError as error:
            self.problem(path, "", f"not a tar: {error}")
            return None
        self.shards[path] = summary.count
        for key, reason in summary.problems:
            self.problem(path, key, reason)
        if not summary.count:
            self.problem(path, "", f"no pairs: members are called {', '.join(summary.names) or 'nothing'}, ...")
        return summary

    def problem(self, path: Shard, key: str, reason: str) -> None:
        """Count one, and keep it for an example while there are few of its kind."""
        kind = reason.partition(":")[0]
        self.problems[path][kind] += 1
        if len(self.examples.setdefault(kind, [])) < EXAMPLES:
            self.examples[kind].append([f"{path.name}/{key}", reason])

    def report(self) -> dict[str, Any]:
        reasons = sum(self.problems.values(), Counter())
        samples = sum(self.shards.values())
        unreadable = sum(count for kind, count in reasons.items() if kind not in STRUCTURE)
        shards = {str(p): {"samples": count, "problems": dict(self.problems[p])} for p, count in self.shards.items()}
        return {
            "samples": samples,
            "usable": samples - unreadable,
            "reasons": dict(reasons.most_common()),
            "shards": shards,
            "examples": self.examples,
        }


def _failures(index: Index, pool: ThreadPoolExecutor, workers: int) -> Iterator[tuple[int, str]]:
    """(id, what is wrong with it or nothing) in order; a few at a time, so that ten million do not queue up."""
    step = AHEAD * workers
    for first in range(0, len(index), step):
        ids = range(first, min(first + step, len(index)))
        yield from zip(ids, pool.map(partial(_problem, index), ids))


def _problem(index: Index, id: int) -> str:
    from clipkit.data.decode import read_pixels

    try:
        members = index.read(id)
        sheet = read_sheet(members)
        for suffix in filter(MEMBER.fullmatch, members):
            read_rows(members[suffix], suffix.split(".")[1], sheet)
        read_pixels(picture_bytes(members)[1])
    except Unreadable as reason:
        return str(reason)
    return ""
