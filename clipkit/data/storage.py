"""Where shards lie: files read in place, URLs read through a cache of blocks, commands whose output is kept.

Both kinds of remote bytes lie under `$CLIPKIT_CACHE` and are shared by all processes of a machine: a block, or the
output of a command, is fetched once by whoever needs it first. blocks/ and shards/ hold at most `$CLIPKIT_CACHE_BYTES`
each. A `pipe:` is only ever run because the user's own config or command line names it; no data can.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import urlsplit

from clipkit.data import remote
from clipkit.data.members import Unreadable
from clipkit.data.remote import State
from clipkit.data.web import Transient, shown
from clipkit.errors import UserError

THREADS = 16
"""Requests of a process at a time."""
HEAD = 4096
"""Bytes at the start of a shard that must be the same for it to be the same shard."""
SILENCE_S = 300.0
"""A command that writes nothing for so long is ended."""
COPY_TRIES = 3
LOCKS = 1024
LOCK_PATIENCE_S = 900.0
EVERY = 8
"""Blocks that a process fetches between two looks at how much all of them take."""
BLOCK_BYTES = 4 << 20
"""Bytes of a remote shard fetched together ($CLIPKIT_BLOCK_BYTES): a lane's window lies within a few blocks."""
CACHE_BYTES = 16 << 30
"""What blocks/ and shards/ may hold each ($CLIPKIT_CACHE_BYTES)."""
_BEGAN = time.time()


@dataclass(frozen=True)
class Url:
    """A shard behind an http(s) or fsspec URL."""

    url: str

    @property
    def name(self) -> str:
        """The last part of its path: what it is called wherever it lies."""
        return urlsplit(self.url).path.rpartition("/")[2] or urlsplit(self.url).netloc

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    def __str__(self) -> str:
        return shown(self.url)


@dataclass(frozen=True)
class Pipe:
    """A shard that a command writes to its standard output."""

    command: str

    @property
    def name(self) -> str:
        """The last .tar that the command names, else a name made from the command."""
        words = re.findall(r"[^\s/'\"=]+\.tar\b", self.command)
        return words[-1] if words else f"pipe-{_hash(self.command)[:8]}.tar"

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return Path(self.name).stem

    def __str__(self) -> str:
        return f"pipe:{self.command}"


Shard: TypeAlias = Path | Url | Pipe


def cache_folder(name: str) -> Path:
    """`$CLIPKIT_CACHE/NAME`, by default ~/.cache/clipkit/NAME."""
    return Path(os.environ.get("CLIPKIT_CACHE") or Path.home() / ".cache" / "clipkit") / name


def bound_bytes() -> int:
    """How much blocks/ and shards/ may hold each."""
    return _number("CLIPKIT_CACHE_BYTES", CACHE_BYTES)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.replace("_", "").isdigit() or not int(text):
        raise UserError(f"{variable}: should be a number of bytes, found {text!r}")
    return int(text)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o644)
        file.write(data)
    os.replace(temporary, path)


def place(shard: Shard) -> str:
    """Names the place of a shard, whatever led to it."""
    if isinstance(shard, Path):
        return str(shard.resolve())
    return shard.url if isinstance(shard, Url) else f"pipe:{shard.command}"


def stamp(shard: Shard) -> dict[str, Any]:
    """What changes with the shard. A URL is asked for it; a command's output is copied first, if it is not yet."""
    if isinstance(shard, Url):
        return {"url": shard.url, **remote.probe(shard.url)._asdict()}
    path = shard if isinstance(shard, Path) else copied(shard)
    state = path.stat()
    return {"path": str(path.resolve()), "size": state.st_size, "mtime_ns": state.st_mtime_ns}


def version(shard: Shard) -> list[Any]:
    """The stamp without the place."""
    return [value for name, value in stamp(shard).items() if name not in ("url", "path")]


def attach(shard: Shard, stamp: dict[str, Any]) -> File | Blocks:
    """The shard that has this stamp, for reading."""
    if isinstance(shard, Url):
        state = _state(stamp)
        return Blocks(shard, state) if state.ranges else File(copied(shard, state))
    return File(shard if isinstance(shard, Path) else copied(shard))


def for_headers(shard: Shard, stamp: dict[str, Any]) -> BinaryIO | remote.Headers:
    """The shard that has this stamp as a file for tarfile, which reads headers and skips what lies between."""
    if isinstance(shard, Url) and stamp["ranges"]:
        return remote.Headers(shard.url, _state(stamp))
    return attach(shard, stamp).path.open("rb")


def head(shard: Shard, stamp: dict[str, Any]) -> str:
    """Hash of the first bytes."""
    if isinstance(shard, Url) and stamp["ranges"]:
        first = remote.fetch(shard.url, 0, min(HEAD, stamp["size"]), _state(stamp)) if stamp["size"] else b""
    else:
        with attach(shard, stamp).path.open("rb") as file:
            first = file.read(HEAD)
    return hashlib.blake2b(first, digest_size=16).hexdigest()


def beside(shard: Shard, suffix: str, limit: int) -> bytes | None:
    """The file NAME.tar + `suffix` beside the shard, if there is one that is not larger than `limit` bytes."""
    if isinstance(shard, Path):
        path = shard.with_name(shard.name + suffix)
        try:
            return path.read_bytes() if path.stat().st_size <= limit else None
        except OSError:
            return None
    if isinstance(shard, Pipe):
        return None
    parts = urlsplit(shard.url)
    url = parts._replace(path=parts.path + suffix).geturl()
    try:
        return remote.retried(url, lambda: b"".join(remote.download(url, limit)), remote.PROBES)
    except UserError:  # none there, or none for us: the index is then made from the shard itself
        return None


def _state(stamp: dict[str, Any]) -> State:
    return State(*(stamp[name] for name in State._fields))


class File:
    """A file read by position. Reads share no cursor: safe between threads, and in workers forked from the trainer."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        """Raises Unreadable if the file ends."""
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise Unreadable(f"shard changed: {len(data)} of {size} bytes at {offset}; it was longer when indexed")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Blocks:
    """A URL read by position, in blocks that all processes of the machine share on disk; holds nothing open."""

    def __init__(self, shard: Url, state: State):
        self.shard, self.state = shard, state
        self.size = _number("CLIPKIT_BLOCK_BYTES", BLOCK_BYTES)
        self.path = cache_folder("blocks") / _hash(json.dumps([shard.url, *state, self.size]))

    def read(self, offset: int, size: int) -> bytes:
        """Raises UserError when the file there is another one by now, or cannot be had."""
        end = offset + size
        return b"".join(
            self._inside(number, max(offset - number * self.size, 0), min(end - number * self.size, self.size))
            for number in range(offset // self.size, -(-end // self.size))
        )

    def missing(self, spans: Iterable[tuple[int, int]]) -> list[int]:
        """Numbers of the blocks under (offset, size) spans that are not on disk."""
        wanted = {n for offset, size in spans for n in range(offset // self.size, -(-(offset + size) // self.size))}
        return sorted(number for number in wanted if not self._file(number).is_file())

    def load(self, number: int, wait: bool = True) -> bytes | None:
        """The block, fetched unless another process just did; None while one is at it (with `wait`: after it)."""
        file = self._file(number)
        with locked("blocks", f"{self.path.name}/{number}", wait) as mine:
            if not mine:
                return None
            with suppress(FileNotFoundError, NotADirectoryError):
                return file.read_bytes()
            start = number * self.size
            data = remote.fetch(self.shard.url, start, min(self.size, self.state.size - start), self.state)
            with _needed(file.parent):
                write_atomic(file, data)
                _tidy(cache_folder("blocks"))
        return data

    def _inside(self, number: int, start: int, end: int) -> bytes:
        try:
            with self._file(number).open("rb") as file:
                data = os.pread(file.fileno(), end - start, start)
        except (FileNotFoundError, NotADirectoryError):  # never fetched, or removed to make room
            data = (self.load(number) or b"")[start:end]
        if len(data) != end - start:
            raise Unreadable(f"shard changed: it ends before {number * self.size + end}; it was longer when indexed")
        return data

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}"


def prefetch(wanted: Sequence[tuple[Blocks, Iterable[tuple[int, int]]]]) -> None:
    """Bring the blocks under these spans to disk, several at a time, those first that no other process is fetching."""
    jobs = [(blocks, number) for blocks, spans in wanted for number in blocks.missing(spans)]
    if jobs:
        with ThreadPoolExecutor(min(THREADS, len(jobs))) as pool:
            left = [
                job for job, data in zip(jobs, pool.map(lambda job: job[0].load(job[1], wait=False), jobs)) if not data
            ]
            list(pool.map(lambda job: job[0].load(job[1]), left))


def copied(shard: Pipe | Url, state: State | None = None) -> Path:
    """The whole shard on disk: what a command writes, or what a server gives that cuts no ranges out. Made once."""
    path = cache_folder("shards") / f"{_hash(json.dumps([str(shard), getattr(shard, 'url', ''), *(state or ())]))}.tar"
    if not path.is_file():
        with _needed(path.parent), locked("shards", path.name) as _:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                remote.retried(str(shard), lambda: _copy(shard, path), COPY_TRIES)
    with suppress(OSError):
        os.utime(path, (time.time(), path.stat().st_mtime))  # in use: others make room first
    return path


def copies() -> tuple[int, int]:
    """(files, bytes) of the shards copied as a whole."""
    sizes = [size for _, size, _ in _ages(cache_folder("shards"))]
    return len(sizes), sum(sizes)


@contextmanager
def locked(kind: str, name: str, wait: bool = True) -> Iterator[bool]:
    """Work that one process (or thread) of this machine should do: True for it, False (with `wait`: later) for others.

    No more than a courtesy: without a place for locks, or after LOCK_PATIENCE_S, the work is done twice, to no harm.
    """
    path = cache_folder("locks") / f"{kind}-{int(_hash(name)[:8], 16) % LOCKS:04d}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        yield True
        return
    try:
        yield _lock(descriptor, LOCK_PATIENCE_S if wait else 0.0) or wait
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough while a process forked meanwhile lives
        os.close(descriptor)


def _lock(descriptor: int, patience_s: float) -> bool:
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return True


def _copy(shard: Pipe | Url, path: Path) -> None:
    room = bound_bytes() - _in_use(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            for piece in remote.download(shard.url) if isinstance(shard, Url) else _output(shard):
                file.write(piece)
                if file.tell() > room:
                    raise UserError(
                        f"{shard}: does not fit into {path.parent} beside the other copies in use; it may hold "
                        f"{bound_bytes():,} bytes: raise CLIPKIT_CACHE_BYTES, or let CLIPKIT_CACHE be a larger disk"
                    )
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    _remove_oldest(path.parent, bound_bytes())


def _output(pipe: Pipe) -> Iterator[bytes]:
    """What the command writes. Raises Transient when it fails or falls silent; it is never left running."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            pipe.command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout
        try:
            with selectors.DefaultSelector() as ready, process.stdout:
                ready.register(process.stdout, selectors.EVENT_READ)
                while ready.select(SILENCE_S):
                    if piece := os.read(process.stdout.fileno(), 1 << 20):
                        yield piece
                    else:
                        break
                else:
                    raise Transient(f"the command wrote nothing for {SILENCE_S:.0f} s")
            status = process.wait(SILENCE_S)
        except subprocess.TimeoutExpired:
            raise Transient("the command closed its output and went on") from None
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 300))
            said = errors.read().decode(errors="replace").strip()
            raise Transient(f"the command ended with status {status}: {said}")


_fetched = 0


def _tidy(folder: Path) -> None:
    global _fetched
    _fetched += 1
    if _fetched % EVERY == 0:
        _remove_oldest(folder, bound_bytes())


def _remove_oldest(folder: Path, bound: int) -> None:
    ages = sorted(_ages(folder))
    total = sum(size for _, size, _ in ages)
    for _, size, path in ages:
        if total <= bound:
            break
        with suppress(OSError):  # another process was first
            os.unlink(path)
        total -= size


def _in_use(folder: Path) -> int:
    return sum(size for used, size, _ in _ages(folder) if used >= _BEGAN)


def _ages(folder: Path) -> list[tuple[float, int, str]]:
    """(last use, size, path) of every file; a file that goes away meanwhile is left out."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                state = os.stat(path := os.path.join(place, name))
                found.append((max(state.st_atime, state.st_mtime), state.st_size, path))
    return found


@contextmanager
def _needed(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); remote shards are kept there while they are "
            "read: let CLIPKIT_CACHE be a folder with room"
        ) from None


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
