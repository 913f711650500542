"""The stream: global steps of a plan into this rank's batches, decoded, augmented and tokenised by worker processes.

What a sample becomes (its caption, negatives and crop) is keyed by (seed, epoch, id) alone, so that batches are the
same for any number of workers and ranks and wherever one starts. Axes: n pairs, k negatives, t tokens, s pixels.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clipkit.data.batch import Batch
from clipkit.data.decode import Preprocess
from clipkit.data.features import FeatureStore
from clipkit.data.mixture import Mixture
from clipkit.data.plan import Plan
from clipkit.data.reader import Online, Reader
from clipkit.data.shards import Index
from clipkit.data.stack import stack
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.settings import DataConfig

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler may send to a job whose time is up."""
FIRST = 64
"""Pairs read ahead of everything else, so that what is wrong with the data is said at once."""


class Loader:
    """Batches of one rank. Raises UserError when the global batch does not divide evenly over the ranks.

    `steps`: of the whole run, which a curriculum is spread over; 0: it is over from the first.
    """

    def __init__(
        self,
        index: Index,
        plan: Plan | Mixture,
        *,
        data: DataConfig,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        seed: int,
        rank: int = 0,
        world: int = 1,
        features: FeatureStore | np.ndarray | None = None,
        teacher_roles: Sequence[str] = (),
        online: Online | None = None,
        steps: int = 0,
    ):
        if plan.batch_size % world:
            raise UserError(f"batch_size: {plan.batch_size} pairs cannot be split evenly over {world} ranks")
        self.workers = data.workers
        reader = Reader(index, plan.ranges, data, preprocess, seed, features, teacher_roles, online)
        self._steps = _Steps(plan, rank, world, reader, tokenizer, steps)

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the global steps start ... stop-1, over as many epochs as that takes.

        The workers live from the first to the last of them. Raises UserError at an unreadable sample
        (`data.on_error: raise`).
        """
        loader = DataLoader(
            self._steps,
            sampler=range(start, stop),
            batch_size=None,
            num_workers=min(self.workers, stop - start),
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: the loader must not draw from the generator that training uses
        )
        for item in loader:
            if isinstance(item, UserError):
                raise item
            yield item


def check_first(index: Index, plan: Plan | Mixture, data: DataConfig) -> None:
    """Read the first FIRST pairs of `plan`; raises UserError at an unreadable one (`data.on_error: raise`)."""
    if data.on_error == "raise":
        reader = Reader(index, plan.ranges, data, Preprocess(), seed=0, features=None)
        ids = plan.rows(0)[0][:FIRST].tolist()
        if index.remote:
            index.prefetch(ids, reader.wanted)
        for id in ids:
            reader.usable(id, 0, [])


class _Steps(Dataset):
    """Global step → this rank's slice of the global batch."""

    def __init__(self, plan: Plan | Mixture, rank: int, world: int, reader: Reader, tokenizer: Tokenizer, steps: int):
        self.plan, self.reader, self.tokenizer, self.steps = plan, reader, tokenizer, steps
        share = plan.batch_size // world
        self.slice = slice(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> Batch | UserError:
        ids, epochs = (numbers[self.slice].tolist() for numbers in self.plan.rows(step))
        skipped: list[tuple[str, str]] = []
        try:
            if self.reader.index.remote:
                self.reader.index.prefetch(ids, self.reader.wanted)
            progress = min(1.0, step / self.steps) if self.steps else 1.0
            rows = self.reader.rows(ids, epochs, skipped, progress)
            return stack(rows, self.reader.data, self.tokenizer, skipped)
        except UserError as error:
            return error  # raised in a worker it would arrive wrapped in a traceback


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)  # the ranks' workers share the cores; a forked pool of threads would not run anyway
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_end_with_trainer, daemon=True).start()


def _end_with_trainer() -> None:
    """A signal that ends a job reaches all its processes; the trainer still needs batches for its last step."""
    while signal.sigwaitinfo(STOPPING).si_pid != os.getppid():
        pass
    os._exit(0)
