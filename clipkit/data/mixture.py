"""Several sources in one stream: every global batch holds exactly the same number of pairs of each.

A source's quota is its share of the batch in whole pairs. Each source has a plan of its own (plan.py) whose batch is
the quota, so everything said there holds of every source by itself: its own epochs, each of its samples at most once in
one of them, any step found by arithmetic. Sources come in the order of their names and lie evenly
through the batch, so that all ranks read of all.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from clipkit.config import Config
from clipkit.data.plan import Plan
from clipkit.data.seeds import bits
from clipkit.data.shards import Index
from clipkit.errors import UserError


class Mixture:
    """The order of reading of several sources. Raises UserError when a source cannot fill its quota."""

    def __init__(self, parts: dict[str, Index], *, shares: dict[str, float], batch_size: int, seed: int, lanes: int):
        self.batch_size = batch_size
        parts = dict(sorted(parts.items()))
        self.quotas = quotas({name: shares[name] for name in parts}, batch_size)
        self.plans = {
            name: _plan(name, part, self.quotas[name], int(bits(1, seed, "source", name)[0] >> np.uint64(1)), lanes)
            for name, part in parts.items()
        }
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts.values()])]).tolist()
        self.ranges = [range(a, b) for a, b in pairwise(starts)]
        self.samples = starts[-1]
        places = [(np.arange(quota) + 0.5) / quota for quota in self.quotas.values()]
        self._order = np.argsort(np.concatenate(places), kind="stable")

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Dense ids and, of each, its source's epoch (int64 [batch_size]) of a global step."""
        drawn = [plan.rows(step) for plan in self.plans.values()]
        ids = np.concatenate([ids + span.start for (ids, _), span in zip(drawn, self.ranges)])
        return ids[self._order], np.concatenate([epochs for _, epochs in drawn])[self._order]

    def position(self, step: int) -> dict[str, Any]:
        """Where step `step` stands in every source, JSON-able; `step_of` is the inverse."""
        return {"step": step, "sources": {name: plan.position(step) for name, plan in self.plans.items()}}

    def step_of(self, position: dict[str, Any]) -> int:
        """The step of a stored position. Raises UserError when it belongs to another order of reading."""
        stored = position.get("sources", {})
        if list(stored) != list(self.plans):
            raise UserError(
                f"data.sources: this run began with {', '.join(stored) or 'one source'}, now {', '.join(self.plans)}"
            )
        for name, plan in self.plans.items():
            try:
                plan.step_of(stored[name])
            except UserError as error:
                raise UserError(f"data.sources.{name}: {error}") from None
        return position["step"]

    def summary(self, steps: int) -> list[str]:
        """A line for each source: its pairs, its quota, and how often a run of `steps` goes through it."""
        return [
            f"{name}: {plan.samples:,} pairs, {plan.batch_size} of {self.batch_size} a batch, "
            f"{steps / plan.batches:.2f} epochs"
            for name, plan in self.plans.items()
        ]


def open_data(config: Config, *, progress: bool = True) -> tuple[Index, Plan | Mixture]:
    """The index of everything a run reads, and the order in which it does."""
    data = config.data
    if not data.sources:
        index = Index.load(data.train, on_error=data.on_error, progress=progress)
        return index, Plan(index, batch_size=config.batch_size, seed=config.seed, lanes=data.lanes)
    parts = {
        name: Index.load(source.train, on_error=data.on_error, progress=progress)
        for name, source in data.sources.items()
    }
    shares = {
        name: source.weight if source.weight is not None else source.epochs * len(parts[name])
        for name, source in data.sources.items()
    }
    mixture = Mixture(parts, shares=shares, batch_size=config.batch_size, seed=config.seed, lanes=data.lanes)
    return Index.join(parts), mixture


def quotas(shares: dict[str, float], batch_size: int) -> dict[str, int]:
    """Whole pairs of a batch for every source, in proportion to `shares` (largest remainders rounded up).

    Raises UserError when a source would get none.
    """
    wanted = np.array(list(shares.values()), dtype=np.float64)
    wanted *= batch_size / wanted.sum()
    given = np.floor(wanted + 1e-9).astype(int)
    largest = np.argsort(given - wanted, kind="stable")
    given[largest[: batch_size - given.sum()]] += 1
    for name, exact, whole in zip(shares, wanted, given):
        if not whole:
            raise UserError(
                f"data.sources.{name}: its share is {exact:.2f} pairs of a batch of {batch_size}; "
                "raise batch_size or its weight"
            )
    return dict(zip(shares, given.tolist()))


def _plan(name: str, part: Index, quota: int, seed: int, lanes: int) -> Plan:
    if len(part) < quota:
        raise UserError(
            f"data.sources.{name}: holds {len(part)} samples, fewer than its {quota} of a batch; lower its weight"
        )
    return Plan(part, batch_size=quota, seed=seed, lanes=lanes)
