"""Weights in place of dropping, and unlikely wordings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from clipkit.data.build import Sample, write_shard
from clipkit.data.shards import Index
from clipkit.errors import UserError
from clipkit.negatives.audit import ALL, blind, read_blindly
from clipkit.negatives.audit.balancing import Balance, reweigh
from clipkit.negatives.audit.plausible import Fluency, implausible
from clipkit.negatives.audit.stored import Stored, read_stored
from tests.typed import well, wrong

WORDS = ["ball", "box", "cup", "hat", "coat", "car", "tree", "boat"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kind "some": a word that captions seldom hold stands in two thirds; "every": in all of them."""
    folder, rng = tmp_path_factory.mktemp("in"), Random(0)

    def pair(number: int) -> Sample:
        a, b = rng.sample(WORDS, 2)
        near = "far from" if rng.random() < 2 / 3 else "near"
        caption = f"a {a} {'far from' if rng.random() < 1 / 5 else 'near'} a {b}"
        made = [
            {"text": f"a {b} {near} a {a}", "kind": "some"},
            {"text": f"a {a} not near a {b}", "kind": "every"},
        ]
        return Sample(f"p{number:04}", b"\xff\xd8", "jpg", [caption], {"negatives": [made]})

    write_shard((pair(i) for i in range(600)), folder / "s.tar")
    return folder


@pytest.fixture(scope="module")
def weighed(shards: Path) -> Balance:
    return reweigh(read_stored(shards), 0.6)


def test_weights_take_from_the_text_what_it_tells(shards: Path, weighed: Balance) -> None:
    stored = read_stored(shards)
    some, weights = weighed.kinds["some"], weighed.weights
    assert weights is not None and some.before.auc > 0.65 and some.after is not None and some.after.auc <= 0.62
    assert some.left == 600 and weighed.kinds[ALL].left == 600  # nothing is dropped
    chosen = stored.of_kind("some")
    assert weights[chosen].mean() == pytest.approx(1)
    told = np.array(["far from" in stored.texts[n] for n in chosen])
    assert weights[chosen][told].mean() < 0.85 < 1.15 < weights[chosen][~told].mean()
    assert some.after.auc > 0.54  # nor does it tell the other way round
    # Measured again without the weights, the text tells as before.
    cues = blind.cues_of([*stored.captions, *stored.texts])
    assert read_blindly(stored, cues, chosen, 5).told.auc > 0.65
    assert read_blindly(stored, cues, chosen, 5, weight=weights[chosen]).told.auc <= 0.63


def test_a_kind_that_no_weights_balance_is_left_out(shards: Path, weighed: Balance) -> None:
    every = weighed.kinds["every"]
    assert every.before.auc > 0.99 and every.after is None and every.left == 0
    assert weighed.weights is not None and not weighed.weights[read_stored(shards).of_kind("every")].any()


def test_whole_numbers_weigh_as_copies(shards: Path) -> None:
    stored = read_stored(shards)
    cues = blind.cues_of([*stored.captions, *stored.texts])
    chosen = stored.of_kind("some")[:200]
    twice = np.where(np.arange(200) % 2, 1.0, 2.0)
    copies = np.sort(np.concatenate([chosen, chosen[twice == 2]]))
    by_weight = read_blindly(stored, cues, chosen, 3, measured=False, weight=twice).told
    by_copies = read_blindly(stored, cues, copies, 3, measured=False).told
    assert by_weight.auc == pytest.approx(by_copies.auc, abs=1e-3)
    assert by_weight.pairs == pytest.approx(by_copies.pairs, abs=0.02)


def test_the_command_writes_them(shards: Path, tmp_path: Path) -> None:
    well("negatives", "audit", shards, "--balance", "0.6", "--by", "weight", "--out", tmp_path / "out")
    index, found = Index.load(tmp_path / "out"), []
    for id in range(len(index)):
        found += json.loads(index.read(id)["json"])["negatives"][0]
    assert len(found) == 600 and {n["kind"] for n in found} == {"some"}
    assert all(n["weight"] > 0 for n in found) and np.mean([n["weight"] for n in found]) == pytest.approx(1, abs=1e-3)
    assert "between 0.5" in wrong("negatives", "audit", shards, "--balance", "0.3", "--by", "weight", "--out", tmp_path)


class Letters:
    """A tokenizer of letters, as transformers' are called."""

    bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 31 + 1 for letter in text]}


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=32, n_positions=128, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def test_surprise_by_loop(model: Any) -> None:
    texts = ["a dog", "an old boat on the sea", "x", "a dog"]
    found = Fluency(model, Letters(), batch_size=3).surprise(texts)
    for text, value in zip(texts, found):
        ids = torch.tensor([[0, *Letters()(text)["input_ids"]]])
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)
        losses = [-float(log_p[0, i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)]
        assert value == pytest.approx(sum(losses) / len(losses), abs=1e-4)


class Told(Fluency):
    """Finds "not" a surprise of 3 nats, everything else of 1."""

    def __init__(self) -> None: ...

    def surprise(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([3.0 if "not" in text else 1.0 for text in texts])


def test_unlikely_negatives_are_left_out(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: Stored = read_stored(shards)
    gone = implausible(stored, Told(), 1.0)
    assert gone.sum() == 600 and {stored.kinds[n] for n in np.flatnonzero(gone)} == {"every"}
    assert not implausible(stored, Told(), 2.5).any()
    monkeypatch.setattr(Fluency, "load", staticmethod(lambda name: Told()))
    well("negatives", "audit", shards, "--plausible", "m", "--out", tmp_path / "out")
    assert set(read_stored(tmp_path / "out").kinds) == {"some"}
    assert "leaves no negative" in wrong(
        "negatives", "audit", shards, "--plausible", "m", "--nats", "-5", "--out", tmp_path / "o"
    )
    monkeypatch.undo()
    with pytest.raises(UserError, match="no causal language model"):
        Fluency.load(str(tmp_path))
