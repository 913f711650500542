"""Which K negatives a step gets: by score, by a curriculum, made while reading; and what each counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.data.build import Sample, write_shard
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.reader import Reader, easiest, hardest
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.negatives.filters import Case, reason_to_drop
from clipkit.negatives.online import OnlineRules, online
from clipkit.settings import DataConfig

from .conftest import sample

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
CAPTIONS = ["a man in a red shirt throws a ball to a brown dog", "two girls sit on a wooden bench in a park"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def scored(tmp_path: Path) -> Index:
    """24 pairs whose negatives have scores and weights of their own."""

    def one(number: int) -> Sample:
        made = sample(number)
        for c, group in enumerate(made.extra["negatives"]):
            for i, negative in enumerate(group):
                negative |= {"score": ((number + 3 * i + 5 * c) % 7) / 7, "weight": 0.5 + i}
        return made

    write_shard((one(i) for i in range(24)), tmp_path / "s.tar")
    return Index.load(tmp_path / "s.tar")


@pytest.fixture
def captioned(tmp_path: Path) -> Index:
    """16 pairs with real captions and no negatives."""
    pairs = (dataclasses.replace(sample(i), captions=[CAPTIONS[i % 2]], extra={}) for i in range(16))
    write_shard(pairs, tmp_path / "c.tar")
    return Index.load(tmp_path / "c.tar")


def loader(index: Index, tokenizer: Tokenizer, rank: int = 0, world: int = 1, rules: Any = None, **data: Any) -> Loader:
    steps = data.pop("steps", 12)
    config = DataConfig(**{"workers": 0, "negatives": 2, **data})
    plan = Plan(index, batch_size=8, seed=5, lanes=4, window=3)
    return Loader(
        index, plan, data=config, preprocess=Preprocess(16), tokenizer=tokenizer, seed=5, rank=rank, world=world,
        online=rules, steps=steps,
    )  # fmt: skip


def negatives(batches: list[Batch]) -> list[list[list[int]]]:
    """Of every step: each pair's negatives, without padding, and what they count."""
    out = []
    for batch in batches:
        assert batch.negative_text is not None and batch.valid is not None
        rows = []
        for texts, valid in zip(batch.negative_text.tolist(), batch.valid.tolist()):
            rows.append([[token for token in text if token] for text, there in zip(texts, valid) if there])
        out.append(rows)
    return out


RULES = OnlineRules(("swap_nouns", "replace_adjectives", "reshuffle", "negate"), 2, 5)
EACH: list[dict[str, Any]] = [
    {"negative_policy": "hardest"},
    {"negative_policy": "curriculum"},
    {"negative_weights": True},
]


@pytest.mark.parametrize("settings", [*EACH, {"rules": RULES}], ids=["hardest", "curriculum", "weights", "online"])
def test_ranks_workers_and_a_new_start_change_nothing(
    settings: dict[str, Any], scored: Index, captioned: Index, tokenizer: Tokenizer
) -> None:
    index = captioned if "rules" in settings else scored
    alone = list(loader(index, tokenizer, **settings).steps(0, 6))
    assert negatives(alone) == negatives(list(loader(index, tokenizer, workers=2, **settings).steps(0, 6)))
    assert negatives(alone[3:]) == negatives(list(loader(index, tokenizer, **settings).steps(3, 6)))
    shares = [list(loader(index, tokenizer, rank=r, world=2, **settings).steps(0, 6)) for r in (0, 1)]
    assert negatives(alone) == [a + b for a, b in zip(*map(negatives, shares))]
    if settings.get("negative_weights"):
        for whole, *parts in zip(alone, *shares):
            joined = [part.negative_weight for part in parts if part.negative_weight is not None]
            assert whole.negative_weight is not None and torch.equal(whole.negative_weight, torch.cat(joined))
    else:
        assert all(batch.negative_weight is None for batch in alone)


def test_the_hardest_are_those_of_the_highest_score(scored: Index) -> None:
    reader = Reader(scored, [range(24)], DataConfig(negatives=2, negative_policy="hardest"), Preprocess(16), 5, None)
    for id in range(24):
        row = reader.row(id, epoch=3)
        record = sample(id).captions.index(row.caption)
        numbers = [((id + 3 * i + 5 * record) % 7) / 7 for i in range(3 if record == 0 else 1)]
        assert [n["score"] for n in row.negatives] == sorted(numbers, reverse=True)[:2]
    ties = [{"text": str(i), "score": 1.0} for i in range(5)]
    drawn = {tuple(n["text"] for n in hardest(ties, 2, epoch)) for epoch in range(20)}
    assert len(drawn) > 5 and hardest([{"text": " ", "score": 9.0}, *ties], 1, 0)[0]["score"] == 1.0


def test_a_curriculum_begins_with_the_easy_half_and_ends_with_all(scored: Index, tokenizer: Tokenizer) -> None:
    texts = [{"text": str(i), "score": float(-i)} for i in range(10)]
    assert [t["text"] for t in easiest(texts, 0.5)] == list("56789") and easiest(texts, 1.0) == texts
    assert easiest(texts, 0.0) == texts[-1:] and easiest([], 0.5) == []
    settings = DataConfig(negatives=3, negative_policy="curriculum", caption="first")
    reader = Reader(scored, [range(24)], settings, Preprocess(16), 5, None)
    for id in range(24):
        begin, end = reader.row(id, 0, progress=0.0), reader.row(id, 0, progress=1.0)
        scores = sorted(n["score"] for n in end.negatives)
        assert len(scores) == 3 and sorted(n["score"] for n in begin.negatives) == scores[:2]
    # The loader spreads it over the run's steps: a run that is over from the first sees all.
    counts = []
    for steps in (100, 0):
        batches = list(loader(scored, tokenizer, negatives=3, steps=steps, **EACH[1]).steps(0, 1))
        counts.append(sum(map(len, negatives(batches)[0])))
    assert counts[0] < counts[1]


def test_a_policy_without_scores_says_what_writes_them(index: Index, tokenizer: Tokenizer) -> None:
    for policy in ("hardest", "curriculum"):
        with pytest.raises(UserError, match="clipkit negatives score MODEL SHARDS"):
            list(loader(index, tokenizer, negative_policy=policy).steps(0, 1))


def test_weights_come_from_the_shard_and_are_one_elsewhere(scored: Index, index: Index, tokenizer: Tokenizer) -> None:
    for batch in loader(scored, tokenizer, negative_weights=True, negatives=4).steps(0, 3):
        assert batch.negative_weight is not None and batch.valid is not None
        assert set(batch.negative_weight[batch.valid].tolist()) <= {0.5, 1.5, 2.5}
        assert (batch.negative_weight[~batch.valid] == 1).all()
    (batch,) = loader(index, tokenizer, negative_weights=True).steps(0, 1)
    assert batch.negative_weight is not None and (batch.negative_weight == 1).all()


def test_online_rules_are_the_rules_and_new_each_epoch(captioned: Index) -> None:
    reader = Reader(captioned, [range(16)], DataConfig(negatives=2), Preprocess(16), 5, None, online=RULES)
    seen = set()
    for epoch in range(6):
        row = reader.row(3, epoch)
        assert len(row.negatives) == 2 and len({n["text"] for n in row.negatives}) == 2
        for negative in row.negatives:
            assert negative["kind"] in RULES.kinds and negative["source"] == "rule"
            assert not reason_to_drop(Case(negative["text"], row.caption, negative["kind"]))
        seen.add(tuple(n["text"] for n in row.negatives))
        assert [n["text"] for n in reader.row(3, epoch).negatives] == [n["text"] for n in row.negatives]
    assert len(seen) > 3


def test_few_kinds_give_several_each(captioned: Index) -> None:
    few = OnlineRules(("reshuffle",), 3, 0)
    reader = Reader(captioned, [range(16)], DataConfig(negatives=3), Preprocess(16), 0, None, online=few)
    assert {len({n["text"] for n in reader.row(id, 0).negatives}) for id in range(16)} == {3}


def test_what_cannot_be_right_is_said_at_once() -> None:
    def problems(**data: Any) -> str:
        with pytest.raises(UserError) as error:
            configuration.load("negclip", [f"data.{name}={value}" for name, value in data.items()])
        return str(error.value)

    assert "data.online_negatives: needs data.negatives" in problems(online_negatives="[negate]", negatives=0)
    assert "no score to choose the hardest by" in problems(online_negatives="[negate]", negative_policy="hardest")
    with pytest.raises(UserError, match="data.negative_weights: act in infonce, igc, tgc"):
        configuration.load("siglip", ["data.negative_weights=true", "data.negatives=1"])
    config = configuration.load("negclip", ["data.online_negatives=[swap_noun]"])
    with pytest.raises(UserError, match="no rule makes swap_noun; did you mean swap_nouns"):
        online(config)
    rules = online(configuration.load("negclip", ["data.online_negatives=[negate]", "seed=7"]))
    assert rules == OnlineRules(("negate",), 1, 7) and online(configuration.load("negclip")) is None
