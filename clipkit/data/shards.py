"""Plain tar shards read at random by offset: one scan of the headers a shard, kept as a small file in a cache folder.

A pair is all members of one key. The key is the member's path without its last suffix (`a/b.c.jpg` → `a/b.c`), so
dotted names and folders keep pairs apart; members need not lie side by side. The dense id of a pair is its position
in (sorted shards, file order). Names in a tar are only ever compared, never used as paths.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from clipkit.data.members import PICTURES, SHEETS, Unreadable
from clipkit.errors import UserError, did_you_mean

FORMAT = 2
"""Raised whenever the cached form of an index changes."""
OPEN_SHARDS = 256
BLOCK = 512
NEGATIVE = re.compile(r"negative\d+")
"""The picture of a hard negative: KEY.negative0.jpg."""


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Summary:
    """What is known of a shard without its table."""

    count: int
    fingerprint: str
    problems: list[list[str]]
    """[key, reason] of everything that is no readable pair."""
    names: list[str]
    """The first few member names, for messages."""


@dataclass(frozen=True)
class Table:
    """Where the pairs of a shard lie: `spans[i, j]` = (offset, size) of the member `suffixes[j]` of `keys[i]`."""

    keys: list[str]
    suffixes: list[str]
    spans: np.ndarray
    """[n s 2] int64; offset -1 where a pair has no such member."""


class Index:
    """All pairs of some shards, by dense id."""

    def __init__(self, shards: list[Path], summaries: list[Summary]):
        self.shards = shards
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
        patterns: str | Path | Sequence[str | Path],
        *,
        on_error: Literal["raise", "skip"] = "raise",
        progress: bool = False,
    ) -> Index:
        """Index the shards named by paths, folders, globs or braces (`x-{000..009}.tar`).

        A shard without a single pair is a UserError; so is, with `on_error="raise"`, a member that belongs to no
        readable pair, a key that comes twice and a tar that was cut off. With "skip" they end up in `problems`.
        """
        shards = expand(patterns)
        summaries = []
        for shard in _tracked(shards) if progress else shards:
            summaries.append(summarise(shard))
            _refuse(shard, summaries[-1], on_error)
        return cls(shards, summaries)

    @classmethod
    def join(cls, parts: dict[str, Index]) -> Index:
        """One index of several sources, in the order of their names. Raises UserError for a shard in two of them."""
        parts, owners = dict(sorted(parts.items())), {}
        for name, part in parts.items():
            for shard in part.shards:
                if (other := owners.setdefault(shard.resolve(), name)) != name:
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

    def where(self, id: int) -> str:
        """`shard/key`, as reports name a pair."""
        return f"{self.shards[self.locate(id)[0]].name}/{self.key(id)}"

    def read(self, id: int, suffixes: Sequence[str] | None = None) -> dict[str, bytes]:
        """The members of a pair by suffix (only those in `suffixes`, if given). Raises Unreadable if the shard ends."""
        shard, position = self.locate(id)
        opened = self._open(shard)
        spans = opened.table.spans[position].tolist()
        return {
            suffix: opened.file.read(offset, size)
            for suffix, (offset, size) in zip(opened.table.suffixes, spans)
            if offset >= 0 and (suffixes is None or suffix in suffixes)
        }

    def _open(self, shard: int) -> _Opened:
        return _opened(self.shards[shard], self._prints[shard])


class TarFolder:
    """Any tar as a folder of files read in place; safe to share between threads."""

    def __init__(self, path: str | Path):
        members, self.problem = scan(Path(path))
        self.path = Path(path)
        self._file = _File(self.path)
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


def expand(patterns: str | Path | Iterable[str | Path]) -> list[Path]:
    """The shards that paths, folders, globs and braces name, sorted, each once. Raises UserError for one with none."""
    single = isinstance(patterns, (str, Path))
    found: set[Path] = set()
    for pattern in [patterns] if single else patterns:  # type: ignore[list-item]
        for name in _braces(str(pattern)):
            found.update(_matches(name))
    if not found:
        raise UserError("no shards named: give tar files, folders or globs")
    return sorted(found)


def scan(path: Path) -> tuple[list[Member], str | None]:
    """A tar's regular files in file order, and "truncated tar" if it was cut off. Raises UserError if it is no tar."""
    members: list[Member] = []
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            with suppress(tarfile.ReadError, EOFError):  # cut off: seen below, where the archive ends
                for entry in tar:
                    if entry.isreg() and not entry.issparse():
                        members.append(Member(entry.name.removeprefix("./"), entry.offset_data, entry.size))
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: not a plain tar archive ({error}); shards are uncompressed .tar files") from None
    whole = [member for member in members if member.offset + member.size <= length]
    with path.open("rb") as file:
        file.seek(end)
        closed = file.read(BLOCK) == bytes(BLOCK)
    return whole, None if closed and len(whole) == len(members) else "truncated tar"


def summarise(path: Path) -> Summary:
    """The shard's summary out of the cache, else from a scan that fills it."""
    if kept := _kept(path, 1):  # not the table behind it: an index of ten million pairs loads in seconds
        return Summary(**kept[0]["summary"])
    return _scanned(path)[0]


class _File:
    # Reads by position share no cursor: safe between threads, and in workers forked from the trainer.
    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise Unreadable(f"shard changed: {len(data)} of {size} bytes at {offset}; it was longer when indexed")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class _Opened(NamedTuple):
    table: Table
    file: _File


@lru_cache(OPEN_SHARDS)
def _opened(path: Path, fingerprint: str) -> _Opened:
    summary, table = _cached(path)
    if summary.fingerprint != fingerprint:
        raise UserError(f"{path}: the shard was changed while in use; start again")
    return _Opened(table, _File(path))


@lru_cache(16)
def _folder(path: Path, _mtime: int) -> TarFolder:
    return TarFolder(path)


def _cached(path: Path) -> tuple[Summary, Table]:
    kept = _kept(path, 2)
    if not kept:
        return _scanned(path)
    head, table = kept
    spans = np.array(table["spans"], dtype=np.int64).reshape(len(table["keys"]), len(table["suffixes"]), 2)
    return Summary(**head["summary"]), Table(table["keys"], table["suffixes"], spans)


def _scanned(path: Path) -> tuple[Summary, Table]:
    stamp = _stamp(path)
    summary, table = _group(*scan(path))
    lines = [{"stamp": stamp, "summary": asdict(summary)}, asdict(table) | {"spans": table.spans.ravel().tolist()}]
    with suppress(OSError):  # a home that cannot be written to costs a scan a start, nothing else
        write_atomic(_cache_file(path), "".join(json.dumps(line) + "\n" for line in lines).encode())
    return summary, table


def _kept(path: Path, lines: int) -> list[dict[str, Any]] | None:
    """The first lines of the shard's cache file (summary, table), if it is about the shard as it is now."""
    try:
        with _cache_file(path).open(encoding="utf-8") as file:
            found = [json.loads(file.readline()) for _ in range(lines)]
    except OSError:
        return None
    return found if found[0]["stamp"] == _stamp(path) else None


def _cache_file(path: Path) -> Path:
    name = hashlib.blake2b(str(path.resolve()).encode(), digest_size=16).hexdigest()
    return cache_folder("index") / f"{name}.json"


def _stamp(path: Path) -> dict[str, Any]:
    state = path.stat()
    return {"format": FORMAT, "path": str(path.resolve()), "size": state.st_size, "mtime_ns": state.st_mtime_ns}


def _group(members: list[Member], problem: str | None) -> tuple[Summary, Table]:
    """Members into pairs: a pair has a picture and a text; what has only one of them is a problem."""
    pairs: dict[str, dict[str, tuple[int, int]]] = {}
    problems = []
    for name, offset, size in members:
        key, _, suffix = name.rpartition(".")
        pair = pairs.setdefault(key, {})
        if suffix.lower() in pair:
            problems.append([key, "duplicate key"])
        else:
            pair[suffix.lower()] = (offset, size)
    _adopt_negative_pictures(pairs)
    keys = []
    for key, pair in pairs.items():
        picture, sheet = not pair.keys().isdisjoint(PICTURES), not pair.keys().isdisjoint(SHEETS)
        if picture and sheet:
            keys.append(key)
        elif picture or sheet:
            problems.append([key, "missing caption" if picture else "missing picture"])
    if problem:
        problems.append([members[-1].name if members else "", problem])
    suffixes = sorted({suffix for key in keys for suffix in pairs[key]})
    spans = [[pairs[key].get(suffix, (-1, 0)) for suffix in suffixes] for key in keys]
    table = Table(keys, suffixes, np.array(spans, dtype=np.int64).reshape(len(keys), len(suffixes), 2))
    mark = hashlib.blake2b(json.dumps([keys, suffixes]).encode() + table.spans.tobytes(), digest_size=16).hexdigest()
    return Summary(len(keys), mark, problems, [member.name for member in members[:6]]), table


def _adopt_negative_pictures(pairs: dict[str, dict[str, tuple[int, int]]]) -> None:
    """KEY.negative0.jpg belongs to KEY, unless a pair is really called KEY.negative0."""
    for key in [key for key in pairs if ".negative" in key]:
        owner, _, name = key.rpartition(".")
        if NEGATIVE.fullmatch(name) and owner in pairs and pairs[key].keys() <= set(PICTURES):
            pairs[owner].update({f"{name}.{suffix}": span for suffix, span in pairs.pop(key).items()})


def _refuse(path: Path, summary: Summary, on_error: str) -> None:
    if not summary.count:
        raise UserError(
            f"{path}: no pair of a picture ({', '.join(PICTURES)}) and a text ({', '.join(SHEETS)}) under one key; "
            f"found members {', '.join(summary.names) or 'none'}, ...; `clipkit shards build` writes such shards"
        )
    if summary.problems and on_error == "raise":
        key, reason = summary.problems[0]
        raise UserError(
            f"{path}: {len(summary.problems)} members cannot be used, the first: {key}: {reason}; "
            "mend the shard (clipkit shards check), or set data.on_error: skip"
        )


def _braces(name: str) -> list[str]:
    if "{" not in name:
        return [name]
    from braceexpand import braceexpand

    return list(braceexpand(name))


def _matches(name: str) -> list[Path]:
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


def _tracked(shards: list[Path]) -> Iterable[Path]:
    from clipkit.data.build import tracked

    return tracked(shards, "indexing shards", total=len(shards))


def cache_folder(name: str) -> Path:
    """`$CLIPKIT_CACHE/NAME`, by default ~/.cache/clipkit/NAME."""
    return Path(os.environ.get("CLIPKIT_CACHE") or Path.home() / ".cache" / "clipkit") / name


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o644)
        file.write(data)
    os.replace(temporary, path)
