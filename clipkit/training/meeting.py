"""How ranks learn what each other's threads have done: collectives belong to the loop, threads use the store."""

from __future__ import annotations

from itertools import count
from threading import Event
from time import monotonic
from typing import Any

import torch.distributed as dist

from clipkit import distributed

POLL_S = 0.05
_numbers = count()


class Meeting:
    """One thing that a thread of every rank does, and tells rank 0. Made by all ranks together, in the same order."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._key = f"clipkit/meeting/{next(_numbers)}"
        # A connection of the thread's own.
        self._store: Any = dist.distributed_c10d._get_default_store().clone() if distributed.active() else None
        self._over = Event()

    def tell(self, problem: str) -> None:
        """This rank is done, or has met with a problem."""
        if self._store:
            self._store.set(f"{self._key}/{distributed.rank()}", problem)

    def wait(self) -> str:
        """Until all are done: the first problem of any rank, or nothing.

        Raises OSError when `leave` was called, and when it takes longer than `timeout_s`.
        """
        if not self._store:
            return ""
        limit = monotonic() + self._timeout_s
        keys = [f"{self._key}/{rank}" for rank in range(distributed.world_size())]
        try:
            while not self._store.check(keys):
                if self._over.wait(POLL_S) or monotonic() > limit:
                    raise OSError("not all ranks have written their parts")
            told = [self._store.get(key).decode() for key in keys]
            for key in keys:
                self._store.delete_key(key)
            return next(filter(None, told), "")
        except dist.DistError as error:
            raise OSError(f"the other ranks cannot be asked any more: {error}") from None

    def leave(self) -> None:
        """Nobody need be waited for any more."""
        self._over.set()
