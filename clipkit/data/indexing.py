"""Many shards indexed: each once, by whichever process comes first, several at a time, with a word on how far it is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from clipkit.data import storage, tables
from clipkit.data.storage import THREADS, Pipe, Shard
from clipkit.data.tables import Summary
from clipkit.errors import UserError

Item = TypeVar("Item")
WORTH = 4
"""Shards for which another process is worth starting."""
EVERY_S = 30.0
"""Seconds between two lines in a log."""


def known(shards: Sequence[Shard]) -> Iterator[Summary | None]:
    """The summaries that the cache has, in order; None for a shard that is not indexed as it lies there now."""
    if all(isinstance(shard, Path) for shard in shards):
        yield from map(tables.kept_summary, shards)
        return
    with ThreadPoolExecutor(THREADS) as pool:  # each URL is asked whether it is what it was
        yield from pool.map(tables.kept_summary, shards)


def build(shards: Sequence[Shard], workers: int = 0, progress: bool = True) -> Iterator[tuple[Shard, Summary]]:
    """Index shards: (shard, summary) as they are finished. Each is kept when finished, so that a second call goes on.

    Up to `workers` processes do it: reading headers keeps a core busy. Few shards are left to threads, which wait for
    servers together and start at once. Several processes that build the same at the same time share the work.
    """
    progress = progress and os.environ.get("RANK", "0") == "0"  # all ranks do this; one voice is enough
    if progress:
        _say(f"indexing {_many(len(shards))} (once; kept in {storage.cache_folder('index')})")
    done = _finished(shards, workers)
    yield from _reported(done, len(shards)) if progress else done
    if progress and any(isinstance(shard, Pipe) for shard in shards):
        files, size = storage.copies()
        _say(f"{storage.cache_folder('shards')} holds copies of {_many(files)}, {size / 1e6:,.1f} MB")


def write_beside(shards: Iterable[Shard]) -> None:
    """Write NAME.tar.index.json beside each of these shards. Raises UserError where nothing can be written."""
    for shard in shards:
        if not isinstance(shard, Path):
            raise UserError(f"{shard}: nothing can be written beside it; make the index where the shard lies as a file")
        try:
            tables.write_beside(shard)
        except OSError as error:
            raise UserError(f"{shard}: nothing can be written beside it ({error.strerror})") from None


def _finished(shards: Sequence[Shard], workers: int) -> Iterator[tuple[Shard, Summary]]:
    with _pool(shards, workers) as pool:
        left = list(shards)
        for wait in (False, True):  # first what no other process is at
            futures = {pool.submit(_index, shard, wait): shard for shard in left}
            left = []
            try:
                for future in as_completed(futures):
                    if summary := future.result():
                        yield futures[future], summary
                    else:
                        left.append(futures[future])
            finally:
                for future in futures:
                    future.cancel()


def _index(shard: Shard, wait: bool) -> Summary | None:
    """The summary of a shard; None if another process is just making it (unless told to wait for that)."""
    with storage.locked("index", str(shard), wait) as mine:
        return tables.summarise(shard) if mine else None


@contextmanager
def _pool(shards: Sequence[Shard], workers: int) -> Iterator[Executor]:
    workers = min(workers, len(shards) // WORTH)
    if workers > 1:
        # Started afresh, not forked: the caller may hold threads (a trainer, a progress bar).
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield pool
    else:
        remote = any(not isinstance(shard, Path) for shard in shards)
        with ThreadPoolExecutor(min(THREADS, len(shards)) if remote else 1) as pool:
            yield pool


def _reported(done: Iterable[Item], total: int) -> Iterator[Item]:
    """`done` behind a progress bar on a terminal, with a line now and then in a log."""
    from clipkit.data.build import tracked

    if sys.stderr.isatty():
        yield from tracked(done, "indexing shards", total)
        return
    began = said = time.monotonic()
    for number, item in enumerate(done, 1):
        now = time.monotonic()
        if now - said > EVERY_S:
            said = now
            left_s = (now - began) / number * (total - number)
            _say(f"indexed {number} of {_many(total)}, about {left_s / 60:.0f} minutes left")
        yield item


def _many(count: int) -> str:
    return f"{count:,} shard{'s' if count != 1 else ''}"


def _say(text: str) -> None:
    print(text, file=sys.stderr)
