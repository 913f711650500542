"""What is known of one shard: its pairs and where they lie. Scanned once; kept in a cache folder or beside the shard.

A pair is all members of one key. The key is the member's path without its last suffix (`a/b.c.jpg` → `a/b.c`), so
dotted names and folders keep pairs apart; members need not lie side by side. Names in a tar are only ever compared,
never used as paths. A file beside a shard may come from anywhere, like the shard: it is checked before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipkit.data import storage
from clipkit.data.members import PICTURES, SHEETS
from clipkit.data.storage import Shard, Url, cache_folder, write_atomic
from clipkit.errors import UserError

FORMAT = 4
"""Raised whenever the kept form of an index changes."""
BLOCK = 512
HOPELESS, HOPELESS_AFAR = 100_000, 5_000
"""A shard (here, behind a URL) whose first members make no pair is given up: the answer should take seconds."""
NEGATIVE = re.compile(r"negative\d+")
"""The picture of a hard negative: KEY.negative0.jpg."""
STORED = re.compile(r"(.+)\.([\w-]+\.(?:image|text|negatives))")
"""Embeddings in the shard: KEY.SET.text.npy (stored.py)."""
EXAMPLES = 6
BESIDE = ".index.json"
LEAST_LIMIT = 1 << 20
"""Bytes that a file beside a shard may always have; beyond them, as many as the shard."""


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
    """A few member names, for messages."""


@dataclass(frozen=True)
class Table:
    """Where the pairs of a shard lie: `spans[i, j]` = (offset, size) of the member `suffixes[j]` of `keys[i]`."""

    keys: list[str]
    suffixes: list[str]
    spans: np.ndarray
    """[n s 2] int64; offset -1 where a pair has no such member."""


def scan(shard: Shard) -> tuple[list[Member], str | None]:
    """A tar's regular files in file order, and "truncated tar" if it was cut off. Raises UserError if it is no tar.

    After HOPELESS members that make no pair the others are left out.
    """
    return _scan(shard, storage.stamp(shard))


def _scan(shard: Shard, stamp: dict[str, Any]) -> tuple[list[Member], str | None]:
    members: list[Member] = []
    length, hopeless = stamp["size"], HOPELESS if isinstance(shard, Path) else HOPELESS_AFAR
    try:
        with storage.for_headers(shard, stamp) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            with suppress(tarfile.ReadError, EOFError):  # cut off: seen below, where the archive ends
                for entry in tar:
                    if entry.isreg() and not entry.issparse():
                        members.append(Member(entry.name.removeprefix("./"), entry.offset_data, entry.size))
                        if len(members) == hopeless and not group(members, None)[0].count:
                            return members, None
            file.seek(tar.offset)
            closed = file.read(BLOCK) == bytes(BLOCK)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard}: not a plain tar archive ({error}); shards are uncompressed .tar files") from None
    whole = [member for member in members if member.offset + member.size <= length]
    return whole, None if closed and len(whole) == len(members) else "truncated tar"


def group(members: list[Member], problem: str | None) -> tuple[Summary, Table]:
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
    _adopt_stored(pairs)
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
    return Summary(len(keys), mark_of(table), problems, _examples(members)), table


def _adopt_negative_pictures(pairs: dict[str, dict[str, tuple[int, int]]]) -> None:
    """KEY.negative0.jpg belongs to KEY, unless a pair is really called KEY.negative0."""
    for key in [key for key in pairs if ".negative" in key]:
        owner, _, name = key.rpartition(".")
        if NEGATIVE.fullmatch(name) and owner in pairs and pairs[key].keys() <= set(PICTURES):
            pairs[owner].update({f"{name}.{suffix}": span for suffix, span in pairs.pop(key).items()})


def _adopt_stored(pairs: dict[str, dict[str, tuple[int, int]]]) -> None:
    """KEY.SET.text.npy belongs to KEY."""
    for key in [key for key, pair in pairs.items() if pair.keys() == {"npy"}]:
        found = STORED.fullmatch(key)
        if found and found[1] in pairs:
            pairs[found[1]][f"{found[2]}.npy"] = pairs.pop(key)["npy"]


def _examples(members: list[Member]) -> list[str]:
    """A few names that show what is there: the first of each suffix, in file order, then the next ones."""
    first: dict[str, str] = {}
    for name, _, _ in members:
        first.setdefault(name.rpartition(".")[2], name)
    return list(dict.fromkeys([*list(first.values())[:EXAMPLES], *(m.name for m in members[:EXAMPLES])]))[:EXAMPLES]


def mark_of(table: Table) -> str:
    """Hash of a table."""
    names = json.dumps([table.keys, table.suffixes]).encode()
    return hashlib.blake2b(names + table.spans.tobytes(), digest_size=16).hexdigest()


def kept_summary(shard: Shard) -> Summary | None:
    """The shard's summary out of the cache, if that is about the shard as it lies there now."""
    found = _kept(shard, 1)  # not the table behind it: an index of ten million pairs loads in seconds
    return Summary(**found[0]["summary"]) if found else None


def summarise(shard: Shard) -> Summary:
    """The summary out of the cache, else from the file beside the shard or from a scan, either of which fills it."""
    return kept_summary(shard) or _made(shard)[1]


def opened(shard: Shard, fingerprint: str) -> tuple[Table, storage.File | storage.Blocks]:
    """The table and the shard itself, for reading. Raises UserError when that is no longer what `fingerprint` names."""
    line, summary, table = _found(shard, ask=False)
    changed = summary.fingerprint != fingerprint
    if not changed and isinstance(shard, Path) and storage.head(shard, line["stamp"]) != line["head"]:
        _cache_file(shard).unlink(missing_ok=True)  # size and time are those of the shard that was indexed
        changed = True
    if changed:
        raise UserError(f"{shard}: the shard was changed while in use; start again")
    return table, storage.attach(shard, line["stamp"])


def write_beside(shard: Path) -> None:
    """Write NAME.tar.index.json: the same for whoever has the same shard, wherever it lies."""
    line, summary, table = _found(shard)
    sheet = {
        "format": FORMAT,
        "size": line["stamp"]["size"],
        "head": line["head"],
        "summary": asdict(summary),
        "table": asdict(table) | {"spans": table.spans.ravel().tolist()},
    }
    if storage.beside(shard, BESIDE, sys.maxsize) != (text := json.dumps(sheet).encode()):
        write_atomic(shard.with_name(shard.name + BESIDE), text)


def _found(shard: Shard, ask: bool = True) -> tuple[dict[str, Any], Summary, Table]:
    """(first line of the cache file, summary, table), from there or made."""
    kept = _kept(shard, 2, ask)
    if not kept:
        return _made(shard)
    line, rows = kept
    return line, Summary(**line["summary"]), _table(rows, np.array(rows["spans"], dtype=np.int64))


def _made(shard: Shard) -> tuple[dict[str, Any], Summary, Table]:
    stamp = {"format": FORMAT, **storage.stamp(shard)}
    summary, table = _read_beside(shard, stamp) or group(*_scan(shard, stamp))
    # A URL has an ETag, and the copy of a command's output is our own: neither needs another look at its first bytes.
    line = {"stamp": stamp, "head": storage.head(shard, stamp) if isinstance(shard, Path) else ""}
    line["summary"] = asdict(summary)
    lines = [line, asdict(table) | {"spans": table.spans.ravel().tolist()}]
    with suppress(OSError):  # a home that cannot be written to costs a scan a start, nothing else
        write_atomic(_cache_file(shard), "".join(json.dumps(part) + "\n" for part in lines).encode())
    return line, summary, table


def _kept(shard: Shard, lines: int, ask: bool = True) -> list[dict[str, Any]] | None:
    """The first lines of the shard's cache file (summary, table), if it is about the shard as it lies there now.

    Without `ask` no URL is asked: each of its answers is compared with the stamp anyway.
    """
    try:
        with _cache_file(shard).open(encoding="utf-8") as file:
            found = [json.loads(file.readline()) for _ in range(lines)]
    except OSError:
        return None
    stamp = found[0]["stamp"]
    if stamp["format"] != FORMAT:
        return None
    asked = ask or not isinstance(shard, Url)
    return found if not asked or stamp == {"format": FORMAT, **storage.stamp(shard)} else None


def _cache_file(shard: Shard) -> Path:
    name = hashlib.blake2b(storage.place(shard).encode(), digest_size=16).hexdigest()
    return cache_folder("index") / f"{name}.json"


def _table(rows: dict[str, Any], spans: np.ndarray) -> Table:
    return Table(rows["keys"], rows["suffixes"], spans.reshape(len(rows["keys"]), len(rows["suffixes"]), 2))


def _read_beside(shard: Shard, stamp: dict[str, Any]) -> tuple[Summary, Table] | None:
    """The index beside the shard, if there is one, it is about this shard, and nothing in it is out of bounds."""
    data = storage.beside(shard, BESIDE, limit=max(LEAST_LIMIT, stamp["size"]))
    if data is None:
        return None
    try:
        sheet = json.loads(data)
        if (sheet["format"], sheet["size"], sheet["head"]) != (FORMAT, stamp["size"], storage.head(shard, stamp)):
            raise ValueError("it is about another shard, or an older form of this one")
        return _checked(sheet["summary"], sheet["table"], stamp["size"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        _ignored(f"{shard}{BESIDE}", error)
        return None


def _checked(said: dict[str, Any], rows: dict[str, Any], size: int) -> tuple[Summary, Table]:
    """Summary and table that anyone may have written. Raises what a wrong one makes raise."""
    texts = [*rows["keys"], *rows["suffixes"], *said["names"], *(text for pair in said["problems"] for text in pair)]
    if not all(isinstance(text, str) for text in texts) or any(len(pair) != 2 for pair in said["problems"]):
        raise ValueError("names should be texts")
    if not all(type(number) is int for number in rows["spans"]):
        raise ValueError("offsets and sizes should be whole numbers")
    table = _table(rows, np.array(rows["spans"], dtype=np.int64))
    offset, length = table.spans[..., 0], table.spans[..., 1]
    here = offset >= 0
    if not np.where(here, (length >= 0) & (length <= size - offset), (offset == -1) & (length == 0)).all():
        raise ValueError("a member lies outside the shard")
    for kinds, what in ((PICTURES, "picture"), (SHEETS, "text")):
        if not here[:, [suffix in kinds for suffix in table.suffixes]].any(axis=1).all():
            raise ValueError(f"a pair without a {what}")
    summary = Summary(said["count"], said["fingerprint"], said["problems"], said["names"])
    if (summary.count, summary.fingerprint) != (len(table.keys), mark_of(table)):
        raise ValueError("its table is not the one it names")
    return summary, table


_SAID: set[str] = set()


def _ignored(file: str, error: Exception) -> None:
    if not _SAID:  # ten thousand of them would be wrong for one reason
        print(f"{file}: not used ({error}), nor any other like it; the shards are indexed anew", file=sys.stderr)
    _SAID.add(file)
