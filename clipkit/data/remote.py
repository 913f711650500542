"""Files behind a URL by byte range: http(s) by itself, everything else (s3, gs, memory, ...) through fsspec.

What may go well the next time is tried again, with growing pauses, a limited number of times. Every attempt has a
deadline. What no attempt can mend (no such file, not allowed, no such library) is said at once.
"""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from clipkit.data import web
from clipkit.data.web import Transient, shown
from clipkit.errors import UserError

T = TypeVar("T")
TRIES = 8
"""Attempts at reading a shard that was there: about a minute of pauses."""
PROBES = 4
"""Attempts at the first look at a shard: a wrong address should be said in seconds."""
PAUSE_S, LONGEST_PAUSE_S = 0.5, 16.0
VERSIONS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")
"""What fsspec's stores call the version of a file, the best first."""
_CHANCE = random.SystemRandom()  # its own: training draws from (and saves) the state of `random`


class State(NamedTuple):
    """A file as it lies there: its size (-1: unknown), what it calls its version, whether it can be read in parts."""

    size: int
    version: str
    ranges: bool


def probe(url: str) -> State:
    """How the file lies there now, in one request. Raises UserError when it does not."""
    if _http(url):
        return State(*retried(url, lambda: web.get_range(url, 0, 1), PROBES)[:3])
    return retried(url, lambda: _looked_up(url), PROBES)


def fetch(url: str, offset: int, size: int, state: State) -> bytes:
    """`size` bytes from `offset`. Raises UserError when the file is no longer as in `state`, or cannot be had."""
    return retried(url, lambda: _part(url, offset, size, state), TRIES)


def download(url: str, limit: int = 0) -> Iterator[bytes]:
    """One attempt at the whole file, in pieces; raises Transient, and UserError beyond `limit` bytes (0: none)."""
    if _http(url):
        yield from web.get_whole(url, limit)
        return
    data = _call(url, "cat_file")
    if limit and len(data) > limit:
        raise UserError(f"{shown(url)}: larger than {limit} bytes")
    yield data


def matching(url: str) -> list[str]:
    """The URLs that a glob matches. Raises UserError over http, where nothing can be listed."""
    if _http(url):
        raise UserError(f"{shown(url)}: http has no listing to match with; name the shards: NAME-{{000..009}}.tar")
    store, path = filesystem(url)
    found = retried(url, lambda: within(lambda: store.glob(path), url), PROBES)
    return [store.unstrip_protocol(name) for name in found]


def retried(what: str, attempt: Callable[[], T], tries: int) -> T:
    """`attempt()` until it raises no Transient; raises UserError after `tries`, with what went wrong."""
    began = time.monotonic()
    for number in range(tries):
        try:
            return attempt()
        except Transient as error:
            reason = error
        if number + 1 < tries:
            pause = min(LONGEST_PAUSE_S, PAUSE_S * 2**number) * _CHANCE.uniform(0.5, 1.0)
            time.sleep(max(pause, min(reason.wait_s, LONGEST_PAUSE_S)))
    raise UserError(
        f"{shown(what)}: could not be read, tried {tries} times in {time.monotonic() - began:.0f} s, at last: {reason};"
        " see whether the address is right and its server up, or copy the shards to a disk here"
    )


def _http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _looked_up(url: str) -> State:
    info = _call(url, "info")
    version = next((f"{name}: {info[name]}" for name in VERSIONS if info.get(name)), "")
    size = info.get("size")
    return State(size, version, True) if isinstance(size, int) else State(-1, version, False)


def _part(url: str, offset: int, size: int, state: State) -> bytes:
    if _http(url):
        answer = web.get_range(url, offset, size)
        now, data = State(*answer[:3]), answer.data
    else:  # these say nothing of what they give: look before
        now, data = _looked_up(url), _call(url, "cat_file", start=offset, end=offset + size)
    if now != state:
        changes = ", ".join(f"{name}: {was} → {is_}" for name, was, is_ in zip(State._fields, state, now) if was != is_)
        raise UserError(f"{shown(url)}: the shard was changed while in use ({changes}); start again")
    if len(data) != size:
        raise Transient(f"{len(data)} of {size} bytes came at {offset}")
    return data


def filesystem(url: str) -> tuple[Any, str]:
    """What fsspec has for the URL, and the path there. Raises UserError where it has nothing."""
    # Asked for anew each time: fsspec keeps its own, and knows which of them belong to this process.
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{shown(url)}: {error}; `pip install 'clipkit[remote]'` brings s3fs and gcsfs") from None
    except ValueError as error:
        raise UserError(
            f"{shown(url)}: {error}; shards lie in files, behind http(s)://, s3://, gs:// or pipe:"
        ) from None


def _call(url: str, method: str, **range: int) -> Any:
    store, path = filesystem(url)
    size = range["end"] - range["start"] if range else 0
    return within(lambda: getattr(store, method)(path, **range), url, size)


def within(call: Callable[[], T], url: str, size: int = 0) -> T:
    """`call()` in a thread that is left behind at its deadline: not every store has timeouts of its own.

    `size` bytes take as long as they may. Raises UserError, or Transient for what may go well the next time.
    """
    done: dict[str, Any] = {}

    def work() -> None:
        try:
            done["value"] = call()
        except Exception as error:  # each store has errors of its own making
            done["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    limit = 2 * web.TIMEOUT_S + size / web.SLOWEST
    thread.join(limit)
    if thread.is_alive():
        raise Transient(f"no answer in {limit:.0f} s")
    if "error" in done:
        raise _blame(url, done["error"]) from None
    return done["value"]


def _blame(url: str, error: Exception) -> Exception:
    if isinstance(error, (FileNotFoundError, IsADirectoryError)):
        return UserError(f"{shown(url)}: no such file; check the address")
    if isinstance(error, PermissionError) or "credential" in type(error).__name__.lower():
        return UserError(f"{shown(url)}: not allowed ({error}); check your credentials for this store")
    if isinstance(error, (ImportError, NotImplementedError, TypeError, ValueError)):
        return UserError(f"{shown(url)}: {type(error).__name__}: {error}")
    return Transient(f"{type(error).__name__}: {error}")


class Headers(io.RawIOBase):
    """A remote tar as tarfile asks for it: reads ahead while the headers lie close, skips where members are large."""

    LEAST, MOST = 256 << 10, 8 << 20

    def __init__(self, url: str, state: State):
        self.url, self.state = url, state
        self._at = self._start = 0
        self._ahead = self.LEAST // 2
        self._window = b""

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self._at = position
        return position

    def read(self, size: int = -1) -> bytes:
        size = max(0, min(size, self.state.size - self._at))
        if not self._start <= self._at <= self._at + size <= self._start + len(self._window):
            self._fill(size)
        start = self._at - self._start
        data = self._window[start : start + size]
        self._at += len(data)
        return data

    def _fill(self, size: int) -> None:
        near = self._start <= self._at <= self._start + 2 * len(self._window)
        self._ahead = min(2 * self._ahead, self.MOST) if near else self.LEAST
        size = min(max(size, self._ahead), self.state.size - self._at)
        self._window, self._start = fetch(self.url, self._at, size, self.state), self._at
