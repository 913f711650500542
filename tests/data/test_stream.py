"""Properties of the stream for any shards, batches, lanes, ranks and interruptions; and a few of them for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipkit.data.build import write_shard
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.settings import DataConfig

from .conftest import sample
from .test_plan import Counts


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Up to twelve uneven shards, some empty; any batch that can be filled, any lanes and windows."""
    counts = draw(st.lists(st.integers(0, 70), min_size=1, max_size=12).filter(any))
    return Plan(
        Counts(counts),  # type: ignore[arg-type]
        batch_size=draw(st.integers(1, sum(counts))),
        seed=draw(st.integers(0, 9)),
        lanes=draw(st.integers(1, 90)),
        window=draw(st.integers(1, 40)),
    )


@settings(max_examples=300, deadline=None)
@given(plans(), st.integers(0, 3))
def test_an_epoch_gives_each_sample_at_most_once_and_loses_only_the_remainder(plan: Plan, epoch: int) -> None:
    given_out = [id for i in range(plan.batches) for id in plan.ids(epoch, i).tolist()]
    assert len(given_out) == len(set(given_out)) == plan.samples - plan.samples % plan.batch_size
    assert set(given_out) <= set(range(plan.samples))


@settings(max_examples=300, deadline=None)
@given(plans(), st.data())
def test_wherever_it_is_taken_up_the_rest_is_the_same(plan: Plan, data: st.DataObject) -> None:
    """A position goes through JSON into another plan of the same data, in the middle of any epoch."""
    stop = data.draw(st.integers(1, 2 * plan.batches + 1))
    step = data.draw(st.integers(0, stop))
    again = Plan(
        Counts(plan.counts.tolist()), batch_size=plan.batch_size, seed=plan.seed, lanes=plan.lanes, window=plan.window
    )  # type: ignore[arg-type]  # fmt: skip
    begin = again.step_of(json.loads(json.dumps(plan.position(step))))
    whole = [plan.ids(*plan.at(s)).tolist() for s in range(stop)]
    assert whole[step:] == [again.ids(*again.at(s)).tolist() for s in range(begin, stop)]


SHARDS = [[5], [1, 1, 1, 1, 1, 1, 1], [9, 2, 6], [1, 30]]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module", params=SHARDS, ids=str)
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, first = tmp_path_factory.mktemp("stream"), 0
    for number, count in enumerate(request.param):
        write_shard((sample(i) for i in range(first, first + count)), folder / f"s-{number}.tar")
        first += count
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    world=st.sampled_from([1, 2, 4]),
    later_world=st.sampled_from([1, 2, 4]),
    workers=st.sampled_from([0, 1, 3]),
    share=st.integers(1, 3),
    lanes=st.integers(1, 9),
    cut=st.integers(0, 5),
)
def test_real_loaders_change_their_number_in_mid_epoch(
    shards: Path, tokenizer: Tokenizer, world: int, later_world: int, workers: int, share: int, lanes: int, cut: int
) -> None:
    """Some ranks with some workers, then others from the middle on: together the plan's global batches."""
    index = Index.load(shards)
    batch = min(4 * share, len(index) // 4 * 4)
    plan = Plan(index, batch_size=batch, seed=1, lanes=lanes, window=4)
    stop = cut + 2

    def steps(rank: int, of: int, start: int, end: int) -> list[Any]:
        data = DataConfig(workers=workers, negatives=1)
        loader = Loader(
            index, plan, data=data, preprocess=Preprocess(16), tokenizer=tokenizer, seed=1, rank=rank, world=of
        )
        return [b.id.tolist() for b in loader.steps(start, end)] if end > start else []

    found: list[list[int]] = []
    for of, start, end in ((world, 0, cut), (later_world, cut, stop)):
        shares = [steps(rank, of, start, end) for rank in range(of)]
        found += [[id for part in parts for id in part] for parts in zip(*shares, strict=True)]
    assert found == [plan.ids(*plan.at(step)).tolist() for step in range(stop)]
