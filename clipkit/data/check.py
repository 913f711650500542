"""A look at shards without training on them: scan, read every pair, show a few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clipkit.data.members import Unreadable, picture_bytes, read_sheet
from clipkit.data.shards import Index, expand, summarise
from clipkit.errors import UserError

EXAMPLES = 5
"""Samples named for each reason."""
STRUCTURE = ("duplicate key", "missing caption", "missing picture", "truncated tar", "not a tar", "no pairs")
"""Reasons that concern what is not a pair of the index at all."""


def index_shards(patterns: str | Path | Sequence[str | Path], progress: bool = True) -> dict[str, Any]:
    """Scan the shards (once; kept in the cache) → {"samples", "fingerprint", "shards": {path: samples}}."""
    index = Index.load(patterns, on_error="skip", progress=progress)
    counts = {str(shard): count for shard, count in zip(index.shards, index.counts)}
    return {"samples": len(index), "fingerprint": index.fingerprint, "shards": counts}


def check_shards(
    patterns: str | Path | Sequence[str | Path], progress: bool = True, threads: int = 2
) -> dict[str, Any]:
    """Decode every picture and read every caption of the shards.

    → {"samples", "usable", "reasons": {reason: count}, "shards": {path: {"samples", "problems": {reason: count}}},
    "examples": {reason: [[shard/key, whole reason], ...]}}; JSON-able. A shard that is no tar at all is counted, too.
    """
    from clipkit.data.build import tracked

    paths = expand(patterns)
    shards: dict[str, Any] = {}
    reasons: Counter[str] = Counter()
    examples: dict[str, list[list[str]]] = {}
    for path in tracked(paths, "checking shards", len(paths)) if progress else paths:
        count, problems = _check_shard(path, threads)
        kinds = [reason.partition(":")[0] for _, reason in problems]
        shards[str(path)] = {"samples": count, "problems": dict(Counter(kinds))}
        reasons.update(kinds)
        for kind, (key, reason) in zip(kinds, problems):
            if len(examples.setdefault(kind, [])) < EXAMPLES:
                examples[kind].append([f"{path.name}/{key}", reason])
    samples = sum(shard["samples"] for shard in shards.values())
    unreadable = sum(count for kind, count in reasons.items() if kind not in STRUCTURE)
    return {
        "samples": samples,
        "usable": samples - unreadable,
        "reasons": dict(reasons),
        "shards": shards,
        "examples": examples,
    }


def show_shard(patterns: str | Path | Sequence[str | Path], n: int = 3, start: int = 0) -> list[dict[str, Any]]:
    """The first `n` pairs from `start` → [{"id", "where", "members": {suffix: bytes}, "picture", "captions", ...}].

    "picture" is "WxH", "negatives" one list of {"text", "kind"} per caption; JSON-able. A pair that cannot be used has
    "problem" in their place.
    """
    index = Index.load(patterns, on_error="skip")
    return [_shown(index, id) for id in range(start, min(start + n, len(index)))]


def _check_shard(path: Path, threads: int) -> tuple[int, list[tuple[str, str]]]:
    """(pairs in the index, [(key, reason)])."""
    try:
        summary = summarise(path)
    except UserError as error:
        return 0, [("", f"not a tar: {error}")]
    problems = [(key, reason) for key, reason in summary.problems]
    if not summary.count:
        return 0, [*problems, ("", f"no pairs: members are called {', '.join(summary.names) or 'nothing'}, ...")]
    index = Index([path], [summary])
    with ThreadPoolExecutor(threads) as pool:
        return summary.count, [*problems, *_failures(index, pool)]


def _failures(index: Index, pool: ThreadPoolExecutor) -> Iterator[tuple[str, str]]:
    for id, reason in enumerate(pool.map(lambda id: _problem(index, id), range(len(index)))):
        if reason:
            yield index.key(id), reason


def _problem(index: Index, id: int) -> str:
    from clipkit.data.decode import read_picture

    try:
        members = index.read(id)
        read_sheet(members)
        read_picture(picture_bytes(members)[1])
    except Unreadable as reason:
        return str(reason)
    return ""


def _shown(index: Index, id: int) -> dict[str, Any]:
    from clipkit.data.decode import read_picture

    members = index.read(id)
    shown = {"id": id, "where": index.where(id), "members": {suffix: len(data) for suffix, data in members.items()}}
    try:
        sheet = read_sheet(members)
        width, height = read_picture(picture_bytes(members)[1]).size
    except Unreadable as reason:
        return shown | {"problem": str(reason)}
    return shown | {
        "picture": f"{width}x{height}",
        "captions": sheet.captions,
        "negatives": sheet.negatives,
        "group": sheet.group,
        "extra": sheet.extra,
    }
