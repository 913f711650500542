"""Plain tar shards read at random by offset, wherever they lie: in files, behind URLs, behind commands.

The dense id of a pair is its position in (sorted shards, file order). What is known of a shard is found once and kept
(tables.py); how its bytes are had is for storage.py.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Container, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from clipkit.data import indexing, remote, storage, tables
from clipkit.data.members import PICTURES, SHEETS
from clipkit.data.storage import Pipe, Shard, Url, cache_folder, version, write_atomic
from clipkit.data.tables import Member, Summary, Table, scan, summarise
from clipkit.errors import UserError, did_you_mean

__all__ = [
    "Index", "Member", "Pattern", "Pipe", "Shard", "Summary", "Table", "TarFolder", "Url", "cache_folder", "expand",
    "read_member", "scan", "summarise", "version", "write_atomic",
]  # fmt: skip
Pattern: TypeAlias = str | Shard
OPEN_SHARDS = 256


class Index:
    """All pairs of some shards, by dense id."""

    def __init__(self, shards: Sequence[Shard], summaries: list[Summary]):
        self.shards = list(shards)
        self.counts = [summary.count for summary in summaries]
        self.problems = [
            (f"{shard.name}/{key}", reason)
            for shard, summary in zip(shards, summaries)
            for key, reason in summary.problems
        ]
        """(shard/key, reason) of what was left out of the index."""
        self._summaries = summaries
        self._prints = [summary.fingerprint for summary in summaries]
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])

    @classmethod
    def load(
        cls,
        patterns: Pattern | Sequence[Pattern],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = True,
        workers: int = 0,
    ) -> Index:
        """Index the shards named by paths, folders, globs, braces (`x-{000..009}.tar`), URLs and `pipe:COMMAND`s.

        Those not indexed before are indexed now, by `workers` processes (0: by this one), with a notice and
        `progress` on standard error. A shard without a single pair is a UserError; so is, with `on_error="raise"`, a
        member that belongs to no readable pair, a key that comes twice and a tar that was cut off. With "skip" they
        end up in `problems`.
        """
        shards = expand(patterns)
        summaries = []
        for shard, summary in zip(shards, indexing.known(shards)):
            if summary:
                _refuse(shard, summary, on_error)
            summaries.append(summary)
        missing = [shard for shard, summary in zip(shards, summaries) if not summary]
        if missing:
            made = {}
            for shard, summary in indexing.build(missing, workers, progress):
                _refuse(shard, summary, on_error)
                made[shard] = summary
            summaries = [summary or made[shard] for shard, summary in zip(shards, summaries)]
        return cls(shards, summaries)

    @classmethod
    def join(cls, parts: dict[str, Index]) -> Index:
        """One index of several sources, in the order of their names. Raises UserError for a shard in two of them."""
        parts, owners = dict(sorted(parts.items())), {}
        for name, part in parts.items():
            for shard in part.shards:
                if (other := owners.setdefault(storage.place(shard), name)) != name:
                    raise UserError(f"data.sources: {shard} is in {other} and in {name}; a shard belongs to one source")
        return cls(
            [shard for part in parts.values() for shard in part.shards],
            [summary for part in parts.values() for summary in part._summaries],
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Names the data: the same shards give the same fingerprint wherever they lie."""
        names = [[shard.name, mark] for shard, mark in zip(self.shards, self._prints)]
        return hashlib.blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()

    def locate(self, id: int) -> tuple[int, int]:
        """(number of the shard, position in it)."""
        if not 0 <= id < len(self):
            raise IndexError(f"id {id} of {len(self)} samples")
        shard = int(np.searchsorted(self._starts, id, side="right")) - 1
        return shard, id - int(self._starts[shard])

    def key(self, id: int) -> str:
        """The pair's key."""
        shard, position = self.locate(id)
        return self._open(shard).table.keys[position]

    def ids(self) -> dict[str, int]:
        """The ids of all pairs by key. Raises UserError for a key in two shards."""
        found: dict[str, int] = {}
        for shard, first in enumerate(self._starts[:-1].tolist()):
            for position, key in enumerate(self._open(shard).table.keys):
                if found.setdefault(key, first + position) != first + position:
                    raise UserError(f"{self.where(first + position)}: another shard has this key too; name pairs apart")
        return found

    def where(self, id: int) -> str:
        """`shard/key`, as reports name a pair."""
        return f"{self.shards[self.locate(id)[0]].name}/{self.key(id)}"

    def read(self, id: int, suffixes: Container[str] | None = None) -> dict[str, bytes]:
        """The members of a pair by suffix (only those in `suffixes`, if given). Raises Unreadable if the shard ends."""
        shard, position = self.locate(id)
        table, file = self._open(shard)
        return {
            suffix: file.read(offset, size)
            for suffix, (offset, size) in zip(table.suffixes, table.spans[position].tolist())
            if offset >= 0 and (suffixes is None or suffix in suffixes)
        }

    @property
    def remote(self) -> bool:
        """Whether a shard is read in blocks from elsewhere, so that `prefetch` pays."""
        return any(isinstance(shard, Url) for shard in self.shards)

    def prefetch(self, ids: Iterable[int], suffixes: Container[str] | None = None) -> None:
        """Fetch what `read` of these pairs will ask for from elsewhere, several requests at a time."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for shard, position in map(self.locate, ids):
            if isinstance(self.shards[shard], Url):
                table = self._open(shard).table
                wanted.setdefault(shard, []).extend(
                    (offset, size)
                    for suffix, (offset, size) in zip(table.suffixes, table.spans[position].tolist())
                    if offset >= 0 and (suffixes is None or suffix in suffixes)
                )
        files = [(self._open(shard).file, spans) for shard, spans in wanted.items()]
        storage.prefetch([(file, spans) for file, spans in files if isinstance(file, storage.Blocks)])

    def _open(self, shard: int) -> _Opened:
        return _opened(self.shards[shard], self._prints[shard])


class TarFolder:
    """Any tar as a folder of files read in place; safe to share between threads."""

    def __init__(self, path: str | Path):
        members, self.problem = scan(Path(path))
        self.path = Path(path)
        self._file = storage.File(self.path)
        self._members = {member.name: member for member in members}

    def paths(self) -> list[str]:
        """Every file's name, sorted."""
        return sorted(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __len__(self) -> int:
        return len(self._members)

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises UserError when there is no such member."""
        if name not in self._members:
            raise UserError(f"{self.path}: no member {name}{did_you_mean(name, self._members)}")
        _, offset, size = self._members[name]
        return self._file.read(offset, size)


def read_member(tar: str | Path, name: str) -> bytes:
    """One member of a tar; tars stay open between calls. Raises UserError when it is not there."""
    return _folder(Path(tar), os.stat(tar).st_mtime_ns).read(name)


def expand(patterns: Pattern | Iterable[Pattern]) -> list[Shard]:
    """The shards that paths, folders, globs, braces, URLs and `pipe:COMMAND`s name, sorted, each once.

    Files come first, URLs after them, commands last. Raises UserError for a pattern without a shard.
    """
    found: set[Shard] = set()
    for pattern in [patterns] if isinstance(patterns, (str, Path, Url, Pipe)) else patterns:
        if isinstance(pattern, (Url, Pipe)):
            found.add(pattern)
        else:
            for name in _braces(str(pattern)):
                found.update(_matches(name))
    if not found:
        raise UserError("no shards named: give tar files, folders, globs, URLs or pipe:COMMAND")
    return sorted(found, key=_place)


class _Opened(NamedTuple):
    table: Table
    file: storage.File | storage.Blocks


@lru_cache(OPEN_SHARDS)
def _opened(shard: Shard, fingerprint: str) -> _Opened:
    return _Opened(*tables.opened(shard, fingerprint))


@lru_cache(16)
def _folder(path: Path, _mtime: int) -> TarFolder:
    return TarFolder(path)


def _refuse(shard: Shard, summary: Summary, on_error: str) -> None:
    if not summary.count:
        raise UserError(
            f"{shard}: no pair of a picture ({', '.join(PICTURES)}) and a text ({', '.join(SHEETS)}) under one key; "
            f"found members {', '.join(summary.names) or 'none'}, ...; `clipkit shards build` writes such shards"
        )
    if summary.problems and on_error == "raise":
        key, reason = summary.problems[0]
        raise UserError(
            f"{shard}: {len(summary.problems)} members cannot be used, the first: {key}: {reason}; "
            "mend the shard (clipkit shards check), or set data.on_error: skip"
        )


def _braces(name: str) -> list[str]:
    if "{" not in name:
        return [name]
    from braceexpand import braceexpand

    try:
        return list(braceexpand(name))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def _place(shard: Shard) -> tuple[int, Sequence[str]]:
    """Sorts shards: within a folder by name, so that the same shards get the same ids wherever they lie."""
    if isinstance(shard, Path):
        return 0, shard.parts
    return (1, shard.url.split("/")) if isinstance(shard, Url) else (2, [shard.command])


def _matches(name: str) -> Sequence[Shard]:
    if name.startswith("pipe:"):
        return [Pipe(name.removeprefix("pipe:").strip())]
    if name.startswith("file://"):
        name = url2pathname(urlsplit(name).path)
    if "://" in name:
        return _urls(name)
    path = Path(name).expanduser()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        hint = "; the folder holds no .tar"
    elif glob.has_magic(name):
        shards = [Path(match) for match in glob.glob(str(path), recursive=True)]
        hint = "; the glob matches nothing"
    else:
        shards = [path] if path.is_file() else []
        beside = [p.name for p in path.parent.glob("*.tar")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside) if beside else f"; there is no shard in {path.parent}"
    if not shards:
        raise UserError(f"{name}: no such shard{hint}")
    return shards


def _urls(name: str) -> list[Url]:
    listed = f"{name}*.tar" if name.endswith("/") else name
    if not glob.has_magic(listed.partition("?")[0]):
        return [Url(name)]
    if found := remote.matching(listed):
        return [Url(url) for url in found]
    raise UserError(f"{name}: no such shard; the store lists nothing of that name")
