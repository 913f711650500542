"""Several ranks inside one test: `run_ranks(fn, world)`.

Ranks are forked from a server process that has only imported things, never from the test process: forking that one
after it has run a backward pass, started a thread or touched a GPU ends in a deadlock or an error.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


class RankError(Exception):
    """The traceback of a failed rank, as the cause of the exception that it raised."""


def run_ranks(fn: Callable[[int, int], Any], world: int, *, timeout_s: float = 30.0) -> list[Any]:
    """`fn(rank, world)` on `world` gloo ranks of one torch thread each; the picklable results, in rank order.

    `fn` and its arguments travel by pickle: a module-level function, or `functools.partial` of one. The first
    exception of a rank is raised here, and the other ranks are ended. TimeoutError after `timeout_s`.
    """
    with started(fn, world, timeout_s=timeout_s) as (_, readers):
        return _collect(readers, timeout_s)


@contextmanager
def started(
    fn: Callable[[int, int], Any], world: int, *, timeout_s: float
) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """The ranks of `run_ranks` while they run, and what will bring their results; in the end all are ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "clipkit.training.loop"])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        ranks: list[BaseProcess] = [
            context.Process(target=_rank, args=(fn, rank, world, Path(folder, "init"), timeout_s, end))
            for rank, (_, end) in enumerate(pipes)
        ]
        try:
            for process, (_, end) in zip(ranks, pipes):
                process.start()
                end.close()
            yield ranks, [reader for reader, _ in pipes]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(readers: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(readers):
        silent = {rank: reader for rank, reader in enumerate(readers) if rank not in results}
        ready = wait(list(silent.values()), timeout=deadline - time.monotonic())
        if not ready:
            raise TimeoutError(f"ranks {list(silent)} are silent after {timeout_s} s")
        for rank, reader in silent.items():
            if reader in ready:
                results[rank] = _received(rank, reader)
    return [results[rank] for rank in range(len(readers))]


def _received(rank: int, reader: Connection) -> Any:
    try:
        result, error, trace = pickle.loads(reader.recv_bytes())
    except EOFError:
        raise RankError(f"rank {rank} ended without a word") from None
    if error is not None:
        raise error from RankError(f"rank {rank}:\n{trace}")
    return result


def _rank(fn: Callable[[int, int], Any], rank: int, world: int, init: Path, timeout_s: float, end: Connection) -> None:
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in here.items()})
    try:
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=timeout)
        result = fn(rank, world)
        if dist.is_initialized():  # a whole training has left the group
            dist.barrier()
            dist.destroy_process_group()
        message = pickle.dumps((result, None, ""))
    except BaseException as error:
        message = pickle.dumps((None, _picklable(error), traceback.format_exc()))
    end.send_bytes(message)


def _picklable(error: BaseException) -> BaseException:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
