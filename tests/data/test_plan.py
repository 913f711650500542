"""The order of reading: a pure function, each sample at most once an epoch, the same from every starting point."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass

import numpy as np
import pytest

from clipkit.data.plan import Plan
from clipkit.data.seeds import bits, permutation
from clipkit.errors import UserError


@dataclass
class Counts:
    """All that a plan asks of an index."""

    counts: list[int]
    fingerprint: str = "f"


def naive(counts: list[int], batch_size: int, seed: int, lanes: int, window: int, epoch: int) -> list[list[int]]:
    """The docstring of plan.py, word for word, with lists."""
    starts = [sum(counts[:s]) for s in range(len(counts))]
    sequence = []
    for shard in permutation(len(counts), seed, "shards", epoch).tolist():
        sequence += range(starts[shard], starts[shard] + counts[shard])
    turn = int(bits(1, seed, "turn", epoch)[0]) % len(sequence)
    sequence = sequence[turn:] + sequence[:turn]
    total = len(sequence) // batch_size * batch_size
    streams, start = [], 0
    for lane in range(lanes):
        length = len(range(lane, total, lanes))
        stream = sequence[start : start + length]
        start += length
        shuffled = []
        for number, first in enumerate(range(0, length, window)):
            part = stream[first : first + window]
            shuffled += [part[j] for j in permutation(len(part), seed, "window", epoch, lane, number).tolist()]
        streams.append(shuffled)
    slots = [streams[t % lanes][t // lanes] for t in range(total)]
    return [slots[i : i + batch_size] for i in range(0, total, batch_size)]


def cases() -> list[tuple[list[int], int, int, int]]:
    """Uneven shards, fewer shards than lanes, lanes that do not divide the batch, lanes beyond the batch."""
    rng = random.Random(0)
    found = [([23], 23, 64, 256), ([5, 1, 9], 4, 1, 3), ([40, 2, 7, 300], 16, 8, 10), ([100], 1, 7, 4)]
    while len(found) < 40:
        counts = [rng.randint(1, 60) for _ in range(rng.randint(1, 9))]
        found.append((counts, rng.randint(1, min(sum(counts), 40)), rng.randint(1, 70), rng.randint(1, 30)))
    return found


@pytest.mark.parametrize(("counts", "batch_size", "lanes", "window"), cases())
def test_plan_is_the_naive_loop_and_gives_each_sample_at_most_once(
    counts: list[int], batch_size: int, lanes: int, window: int
) -> None:
    plan = Plan(Counts(counts), batch_size=batch_size, seed=3, lanes=lanes, window=window)  # type: ignore[arg-type]
    for epoch in (0, 5):
        batches = [plan.ids(epoch, i).tolist() for i in range(plan.batches)]
        assert batches == naive(counts, batch_size, 3, lanes, window, epoch)
        flat = [id for batch in batches for id in batch]
        assert len(flat) == len(set(flat)) == sum(counts) - sum(counts) % batch_size
        assert set(flat) <= set(range(sum(counts)))


def test_a_batch_takes_its_share_of_every_lane() -> None:
    plan = Plan(Counts([1000]), batch_size=50, lanes=8)  # type: ignore[arg-type]
    turn = int(bits(1, 0, "turn", 0)[0]) % 1000
    for i in range(plan.batches):
        places = (plan.ids(0, i) - turn) % 1000
        shares = np.bincount(places // 125, minlength=8)
        assert set(shares.tolist()) <= {6, 7}


def test_the_order_never_changes() -> None:
    plan = Plan(Counts([700, 300, 24]), batch_size=128, seed=1, lanes=16)  # type: ignore[arg-type]
    assert plan.ids(0, 0)[:6].tolist() == [90, 146, 211, 285, 352, 416]
    assert plan.ids(2, 6)[-6:].tolist() == [732, 837, 851, 928, 973, 34]


def test_references_say_where_a_sample_lies() -> None:
    counts = [5, 1, 9]
    plan = Plan(Counts(counts), batch_size=5, lanes=3)  # type: ignore[arg-type]
    for i in range(plan.batches):
        batch = plan.batch(0, i)
        assert [ref.id for ref in batch] == plan.ids(0, i).tolist()
        assert all(ref.id == sum(counts[: ref.shard]) + ref.index and ref.index < counts[ref.shard] for ref in batch)


def test_epochs_and_seeds_differ_and_the_remainder_moves() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        plan = Plan(Counts([103, 50]), batch_size=16, seed=seed, lanes=8)  # type: ignore[arg-type]
        return [id for i in range(plan.batches) for id in plan.ids(number, i).tolist()]

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert all(a != b for a in orders for b in orders if a is not b)
    left_out = [frozenset(range(153)) - set(order) for order in orders]
    assert {len(rest) for rest in left_out} == {9} and len(set(left_out)) == 3


def test_a_small_set_is_well_mixed() -> None:
    """Neighbours in the file are no likelier to meet in a batch than chance by much."""
    plan = Plan(Counts([2000, 2000, 2000]), batch_size=256)  # type: ignore[arg-type]
    home = np.full(6000, -1)
    for i in range(plan.batches):
        home[plan.ids(0, i)] = i
    together = float(np.mean(home[1:] == home[:-1]))
    assert together < 2 / plan.batches


def test_position_goes_through_json() -> None:
    plan = Plan(Counts([100]), batch_size=30, seed=2)  # type: ignore[arg-type]
    assert plan.at(7) == (2, 1)
    position = json.loads(json.dumps(plan.position(7)))
    assert (position["epoch"], position["batch"]) == (2, 1) and plan.step_of(position) == 7
    with pytest.raises(UserError, match="batch_size: 30 → 20"):
        Plan(Counts([100]), batch_size=20, seed=2).step_of(position)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fingerprint: f → g"):
        Plan(Counts([100], "g"), batch_size=30, seed=2).step_of(position)  # type: ignore[arg-type]


def test_too_little_data_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="batch_size: 24 is more than the 23 samples"):
        Plan(Counts([7, 1, 15]), batch_size=24)  # type: ignore[arg-type]
    assert Plan(Counts([7, 1, 15]), batch_size=23).batches == 1  # type: ignore[arg-type]


def test_seeking_is_arithmetic() -> None:
    """The middle of the third epoch of ten million samples, without reading what lies before."""
    began = time.perf_counter()
    plan = Plan(Counts([1000] * 10_000), batch_size=4096)  # type: ignore[arg-type]
    ids = plan.ids(2, plan.batches // 2)
    assert len(set(ids.tolist())) == 4096 and time.perf_counter() - began < 1
