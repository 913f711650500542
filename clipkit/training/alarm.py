"""Where one rank fails all end, within seconds and with the reason first."""

from __future__ import annotations

import json
import os
import sys
import threading
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from clipkit import distributed
from clipkit.errors import PeerFailed, Stopped, UserError

FAILED, SEEN = "clipkit/failed", "clipkit/seen"
"""Keys in the store through which the ranks met: what the first to fail said, and how many others have read it."""
POLL_S, GRACE_S = 0.25, 3.0


class Alarm:
    """A context around what the ranks do together.

    Left alone, ranks wait in a collective for one that has failed: until its connection closes (gloo), or until the
    launcher or `engine.timeout_s` ends them (NCCL). Here the first rank to raise says so to all, and waits until they
    know. Each of them gets GRACE_S to come out by itself, then its process ends. What the others raise meanwhile
    follows from the first and becomes PeerFailed, whose exit status is that of the first.
    """

    def __init__(self) -> None:
        self._store: Any = None
        self._said: dict[str, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> Alarm:
        if distributed.active():
            self._rank, self._others = distributed.rank(), distributed.world_size() - 1
            self._store = dist.distributed_c10d._get_default_store().clone()  # a connection of this thread's own
            self._watcher = threading.Thread(target=self._watch, args=(self._store.clone(),), daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._store:
            return
        self._over.set()
        self._watcher.join()
        if not isinstance(error, Exception) or isinstance(error, Stopped):
            return
        own = {"rank": self._rank, "said": _told(error), "code": 2 if isinstance(error, UserError) else 1}
        first = self._said or self._tell(own)
        if first != own:
            here = "" if own["said"] == first["said"] else f"; here: {own['said']}"
            raise PeerFailed(_ends(self._rank, first) + here, first["code"]) from None
        if isinstance(error, UserError):
            raise UserError(f"rank {self._rank}: {error}") from None
        get_error_handler().record_exception(error)  # torchrun names the rank that wrote this as the cause
        print(f"rank {self._rank} failed: {own['said']}", file=sys.stderr, flush=True)

    def _tell(self, own: dict[str, Any]) -> dict[str, Any]:
        """What the first rank to fail said, which may be this one; then all others know it."""
        try:
            first = json.loads(self._store.compare_set(FAILED, "", json.dumps(own)))
            if first == own:
                self._wait_until_seen()
            else:
                self._store.add(SEEN, 1)
            return first
        except dist.DistError:  # the rank that keeps the store is gone
            return own

    def _wait_until_seen(self) -> None:
        over, rounds = threading.Event(), int(GRACE_S / POLL_S)
        while self._store.add(SEEN, 0) < self._others and rounds:
            over.wait(POLL_S)
            rounds -= 1

    def _watch(self, store: Any) -> None:
        """Until the context is left, or a rank has failed: then it must be left soon."""
        try:
            while not store.check([FAILED]):
                if self._over.wait(POLL_S):
                    return
            self._said = json.loads(store.get(FAILED))
            store.add(SEEN, 1)
        except dist.DistError:  # the rank that keeps the store is gone; whether that matters is not known here
            return
        if self._said["rank"] != self._rank and not self._over.wait(GRACE_S):
            print(_ends(self._rank, self._said), file=sys.stderr, flush=True)
            os._exit(self._said["code"])


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _ends(rank: int, first: dict[str, Any]) -> str:
    return f"rank {rank} ends because rank {first['rank']} failed: {first['said']}"
