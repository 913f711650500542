"""Who reads what, in which order, from where: the sequence of global batches as a pure function.

It depends on (index, batch size, seed, lanes, window) alone, never on ranks, workers or where a run was interrupted,
and any batch of any epoch is found by arithmetic:

    shards, permuted by (seed, epoch), make one virtual sequence of N samples, turned by a seeded offset
    its first T = ⌊N / B⌋ · B samples are cut into P lanes, whose lengths differ by at most one
    each lane is shuffled in seeded windows, so that reading it stays nearly sequential
    slot t of the epoch (batch t // B) is sample t // P of lane t mod P

So a batch takes B/P samples of every lane: exactly, or ⌊B/P⌋ and ⌈B/P⌉ where P does not divide B. Every sample comes
at most once an epoch; the N mod B samples behind the cut are left out of that epoch (others in the next one).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clipkit.data.seeds import bits, permutation
from clipkit.errors import UserError

if TYPE_CHECKING:
    from clipkit.data.shards import Index

WINDOW = 256
"""Samples of a lane that are shuffled among themselves: 64 lanes mix 16,384 samples at a time."""


class SampleRef(NamedTuple):
    """A sample by its dense id, and where it lies: number of the shard and position in it."""

    id: int
    shard: int
    index: int


class Plan:
    """The order of reading. Raises UserError when the data does not fill one batch."""

    def __init__(self, index: Index, *, batch_size: int, seed: int = 0, lanes: int = 64, window: int = WINDOW):
        self.counts = np.array(index.counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.batch_size, self.seed, self.lanes, self.window = batch_size, seed, lanes, window
        self.fingerprint = index.fingerprint
        if self.samples < batch_size:
            raise UserError(f"batch_size: {batch_size} is more than the {self.samples} samples of data.train; lower it")
        self.ranges = [range(self.samples)]
        """The dense ids of each source: here all of one."""
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def batches(self) -> int:
        """Global batches an epoch."""
        return self.samples // self.batch_size

    def at(self, step: int) -> tuple[int, int]:
        """Global step → (epoch, batch of the epoch)."""
        return divmod(step, self.batches)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Dense ids and, of each, the epoch (int64 [batch_size]) of a global step."""
        epoch, i = self.at(step)
        return self.ids(epoch, i), np.full(self.batch_size, epoch)

    def batch(self, epoch: int, i: int) -> list[SampleRef]:
        """The global batch `i` of an epoch, in order; ranks take contiguous slices of it."""
        ids = self.ids(epoch, i)
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        positions = ids - self._starts[shards]
        return [SampleRef(*row) for row in zip(ids.tolist(), shards.tolist(), positions.tolist())]

    def ids(self, epoch: int, i: int) -> np.ndarray:
        """Dense ids (int64 [batch_size]) of the global batch `i` of an epoch."""
        if not 0 <= i < self.batches:
            raise IndexError(f"batch {i} of {self.batches} an epoch")
        slots = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
        lane, place = slots % self.lanes, slots // self.lanes
        return self._virtual(epoch, self._lane_start(lane) + self._shuffled(epoch, lane, place))

    def position(self, step: int) -> dict[str, Any]:
        """Where step `step` stands, JSON-able; `step_of` is the inverse."""
        epoch, i = self.at(step)
        return {"step": step, "epoch": epoch, "batch": i, **self._identity()}

    def step_of(self, position: dict[str, Any]) -> int:
        """The step of a stored position. Raises UserError when it belongs to another order of reading."""
        changed = [f"{k}: {position.get(k)} → {v}" for k, v in self._identity().items() if position.get(k) != v]
        if changed:
            raise UserError(f"not the data and order that this run began with ({', '.join(changed)})")
        return position["step"]

    def summary(self, steps: int) -> list[str]:
        """In words: the pairs, and how often a run of `steps` goes through them."""
        return [f"{self.samples:,} pairs, {steps / self.batches:.2f} epochs"]

    def _identity(self) -> dict[str, Any]:
        names = ("samples", "batch_size", "seed", "lanes", "window", "fingerprint")
        return {name: getattr(self, name) for name in names}

    def _lane_start(self, lane: np.ndarray) -> np.ndarray:
        """Where a lane begins in the virtual sequence: the first `extra` lanes are one sample longer."""
        short, extra = divmod(self.batches * self.batch_size, self.lanes)
        return lane * short + np.minimum(lane, extra)

    def _shuffled(self, epoch: int, lane: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Where in its lane the sample lies that comes at `place`."""
        window, inside = np.divmod(place, self.window)
        codes, which = np.unique(window * self.lanes + lane, return_inverse=True)
        out = np.empty_like(place)
        for number, code in enumerate(codes.tolist()):
            this_window, this_lane = divmod(code, self.lanes)
            here = which == number
            out[here] = this_window * self.window + self._order(epoch, this_lane, this_window)[inside[here]]
        return out

    def _order(self, epoch: int, lane: int, window: int) -> np.ndarray:
        short, extra = divmod(self.batches * self.batch_size, self.lanes)
        length = short + (lane < extra)
        size = min(self.window, length - window * self.window)
        return _window(size, self.seed, epoch, lane, window)

    def _virtual(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Positions in the turned sequence of permuted shards → dense ids."""
        order = _shard_order(len(self.counts), self.seed, epoch)
        starts = np.concatenate([[0], np.cumsum(self.counts[order])])
        turn = int(bits(1, self.seed, "turn", epoch)[0]) % self.samples
        positions = (positions + turn) % self.samples
        shard = np.searchsorted(starts, positions, side="right") - 1
        return self._starts[order[shard]] + positions - starts[shard]


@lru_cache(4)
def _shard_order(shards: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(shards, seed, "shards", epoch)


@lru_cache(1 << 12)
def _window(size: int, seed: int, epoch: int, lane: int, window: int) -> np.ndarray:
    return permutation(size, seed, "window", epoch, lane, window)
