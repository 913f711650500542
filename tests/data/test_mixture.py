"""Several sources: exact quotas, epochs of their own, the same batches however one gets there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit import config as configuration
from clipkit.data.build import write_shard
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.mixture import Mixture, open_data, quotas
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.settings import DataConfig

from .conftest import sample

SIZES = {"large": (11, 9, 20), "middle": (17,), "small": (2, 1)}
SHARES = {"large": 5, "middle": 2, "small": 1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Index]:
    """Three sources of 40, 17 and 3 pairs."""
    folder, found, first = tmp_path_factory.mktemp("sources"), {}, 0
    for name, counts in SIZES.items():
        (folder / name).mkdir()
        for number, count in enumerate(counts):
            write_shard((sample(i) for i in range(first, first + count)), folder / name / f"{number}.tar")
            first += count
        found[name] = Index.load(folder / name)
    return found


def mixture(parts: dict[str, Index], batch_size: int = 16, seed: int = 0) -> Mixture:
    return Mixture(parts, shares=SHARES, batch_size=batch_size, seed=seed, lanes=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 5000))
def test_quotas_fill_the_batch_and_are_the_nearest_whole_numbers(weights: list[float], batch_size: int) -> None:
    shares = {str(i): weight for i, weight in enumerate(weights)}
    try:
        found = quotas(shares, batch_size)
    except UserError:
        assert min(weights) / sum(weights) * batch_size < 1
        return
    assert sum(found.values()) == batch_size and min(found.values()) >= 1
    for name, weight in shares.items():
        assert abs(found[name] - weight / sum(weights) * batch_size) < 1 + 1e-6


def test_quotas_by_hand() -> None:
    assert quotas({"a": 1, "b": 2}, 128) == {"a": 43, "b": 85}
    assert quotas({"a": 5, "b": 2, "c": 1}, 16) == {"a": 10, "b": 4, "c": 2}
    with pytest.raises(UserError, match=r"data.sources.b: its share is 0.16 pairs of a batch of 16"):
        quotas({"a": 99, "b": 1}, 16)


def test_every_batch_holds_the_quotas_and_every_source_keeps_its_own_epochs(parts: dict[str, Index]) -> None:
    mixed = mixture(parts)
    assert mixed.quotas == {"large": 10, "middle": 4, "small": 2}
    seen: dict[tuple[str, int], list[int]] = {}
    for step in range(40):
        ids, epochs = mixed.rows(step)
        assert len(ids) == len(epochs) == 16
        for (name, plan), span in zip(mixed.plans.items(), mixed.ranges):
            mine = (ids >= span.start) & (ids < span.stop)
            assert mine.sum() == mixed.quotas[name] and set(epochs[mine]) == {step // plan.batches}
            assert abs(mine[:8].sum() - mixed.quotas[name] / 2) <= 1, "a rank's share lacks one of the sources"
            seen.setdefault((name, step // plan.batches), []).extend(ids[mine].tolist())
    for (name, epoch), ids in seen.items():
        plan = mixed.plans[name]
        assert len(ids) == len(set(ids)), (name, epoch)
        if (epoch + 1) * plan.batches <= 40:
            assert len(ids) == plan.samples - plan.samples % plan.batch_size


def test_sources_of_one_size_are_not_shuffled_alike(parts: dict[str, Index]) -> None:
    twins = Mixture({"a": parts["large"], "b": parts["large"]}, shares={"a": 1, "b": 1}, batch_size=16, seed=0, lanes=4)
    ids = twins.rows(0)[0]
    assert sorted(ids[ids < 40]) != sorted(ids[ids >= 40] - 40)


def loaded(parts: dict[str, Index], start: int, stop: int, **topology: int) -> list[list[tuple]]:
    """(id, text) of every row, by step."""
    data = DataConfig(workers=0, negatives=1)
    loader = Loader(
        Index.join(parts), mixture(parts), data=data, preprocess=Preprocess(16), tokenizer=Tokenizer(), seed=0,
        **topology,
    )  # fmt: skip
    return [
        list(zip(batch.id.tolist(), [[t for t in text if t] for text in batch.text.tolist()]))
        for batch in loader.steps(start, stop)
    ]


def test_the_same_batches_for_any_ranks_and_from_any_step(parts: dict[str, Index]) -> None:
    whole = loaded(parts, 0, 9)
    assert [[id for id, _ in rows] for rows in whole] == [mixture(parts).rows(step)[0].tolist() for step in range(9)]
    for world in (2, 4):
        shares = [loaded(parts, 3, 9, rank=rank, world=world) for rank in range(world)]
        assert [[row for rows in step for row in rows] for step in zip(*shares)] == whole[3:]


def test_a_position_survives_json_and_belongs_to_its_sources(parts: dict[str, Index]) -> None:
    mixed = mixture(parts)
    position = json.loads(json.dumps(mixed.position(7)))
    assert mixture(parts).step_of(position) == 7
    assert position["sources"]["small"]["epoch"] == 7
    with pytest.raises(UserError, match=r"data.sources.large: not the data and order .*seed"):
        mixture(parts, seed=1).step_of(position)
    with pytest.raises(UserError, match="began with large, middle, small, now large, small"):
        two = {name: parts[name] for name in ("large", "small")}
        Mixture(two, shares={"large": 5, "small": 1}, batch_size=16, seed=0, lanes=4).step_of(position)


def test_an_unreadable_pair_is_replaced_by_one_of_its_own_source(parts: dict[str, Index], tmp_path: Path) -> None:
    bad = sample(0)
    bad.image = b"\xff\xd8\xff no picture"
    write_shard([sample(90), sample(91), bad], tmp_path / "bad.tar")
    mixed = {"bad": Index.load(tmp_path / "bad.tar"), "good": parts["large"]}
    plan = Mixture(mixed, shares={"bad": 3, "good": 3}, batch_size=6, seed=0, lanes=4)
    loader = Loader(
        Index.join(mixed), plan, data=DataConfig(workers=0, on_error="skip"), preprocess=Preprocess(16),
        tokenizer=Tokenizer(), seed=0,
    )  # fmt: skip
    (batch,) = loader.steps(0, 1)
    assert sorted(id for id in batch.id.tolist() if id < 3) == [0, 0, 1]
    assert [where for where, _ in batch.skipped] == ["bad.tar/k00000"]


def test_a_shard_belongs_to_one_source(parts: dict[str, Index]) -> None:
    with pytest.raises(UserError, match=r"0\.tar is in a and in b"):
        Index.join({"a": parts["middle"], "b": parts["middle"]})


def opened(parts: dict[str, Index], sources: dict[str, dict], batch_size: int = 16) -> Mixture:
    places = {name: {"train": [str(parts[name].shards[0].parent)], **source} for name, source in sources.items()}
    index, plan = open_data(configuration.validate({"batch_size": batch_size, "data": {"sources": places}}))
    assert isinstance(plan, Mixture) and len(index) == plan.samples
    return plan


def test_shares_are_weights_or_follow_from_sizes_and_epochs(parts: dict[str, Index]) -> None:
    assert opened(parts, {"large": {"weight": 1}, "middle": {"weight": 3}}).quotas == {"large": 4, "middle": 12}
    assert opened(parts, {"large": {}, "middle": {}}, 57).quotas == {"large": 40, "middle": 17}
    assert opened(parts, {"large": {}, "small": {"epochs": 2.5}}, 19).quotas == {"large": 16, "small": 3}
    with pytest.raises(UserError, match=r"data.sources.small: holds 3 samples, fewer than its 8 of a batch"):
        opened(parts, {"large": {"weight": 1}, "small": {"weight": 1}})


def test_the_summary_says_how_often_each_source_is_read(parts: dict[str, Index]) -> None:
    assert mixture(parts).summary(10) == [
        "large: 40 pairs, 10 of 16 a batch, 2.50 epochs",
        "middle: 17 pairs, 4 of 16 a batch, 2.50 epochs",
        "small: 3 pairs, 2 of 16 a batch, 10.00 epochs",
    ]
    assert open_data(configuration.validate({"batch_size": 5, "data": {"train": [str(parts["middle"].shards[0])]}}))[
        1
    ].summary(6) == ["17 pairs, 2.00 epochs"]


def test_wrong_sources_are_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        configuration.validate(
            {"data": {"train": ["x"], "sources": {"a": {"train": ["y"], "weight": 2, "epochs": 2}, "b": {"train": []}}}}
        )
    assert str(caught.value).splitlines()[1:] == [
        "  data.sources: stands instead of data.train, both are given",
        "  data.sources: give every source a weight, or none; without: b",
        "  data.sources.a.epochs: weights already say how often it is read",
    ]
    with pytest.raises(UserError, match="data.sources.a.wieght: no such setting; did you mean weight"):
        configuration.validate({"data": {"sources": {"a": {"train": ["y"], "wieght": 2}}}})
