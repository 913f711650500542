"""Numbers about shards, against what a plain loop over small ones finds."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clipkit.data.build import Sample, encode_jpeg, write_shard
from clipkit.data.pace import pace
from clipkit.data.shards import Index
from clipkit.data.statistics import spread, statistics
from clipkit.errors import UserError

from .conftest import noise_picture, sample


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pace is not the point here."""
    monkeypatch.setattr("clipkit.data.pace.PAIRS", 64)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with every peculiarity: repeated captions and pictures, groups, long texts, PNG, unreadable pairs."""
    folder = tmp_path_factory.mktemp("mixed")
    a, b, c = (encode_jpeg(noise_picture(n, 30 + n, 20)) for n in range(3))
    png = noise_png()
    negatives = [[{"text": "x", "kind": "swap"}, {"text": " ", "kind": "swap"}], [{"text": "y"}]]
    first = [
        Sample("a1", a, "jpg", ["a dog", "a cat"], {"group": "a", "negatives": negatives}),
        Sample("a2", a, "jpg", ["a dog", "a dog"], {"group": "a"}),
        Sample("b1", b, "jpg", ["word " * 100], {"group": "b"}),
        Sample("bad", b"\xff\xd8\xff", "jpg", ["unread"]),
    ]
    second = [
        Sample("b2", b, "jpg", ["a dog"], {"group": "c"}),
        Sample("c1", c, "jpg", ["only here", "only here"]),
        Sample("p1", png, "png", ["é ! ?!"]),
        Sample("p2", png, "png", ["", "the last"]),
    ]
    write_shard(first, folder / "m-0.tar")
    write_shard(second, folder / "m-1.tar")
    return folder


def noise_png() -> bytes:
    """A picture of 10 × 50 pixels."""
    buffer = io.BytesIO()
    noise_picture(9, 10, 50).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_number_of_small_shards(mixed: Path) -> None:
    found = statistics(mixed, workers=0, progress=False)
    assert json.loads(json.dumps(found)) == found
    assert (found["shards"], found["pairs"], found["sample"]) == (2, 8, None)
    assert found["unreadable"] == {"unreadable picture": 1}
    captions = found["captions"]
    assert captions["count"] == 10 and captions["a_pair"]["greatest"] == 2 and captions["words"]["greatest"] == 100
    assert captions["tokens"]["greatest"] == 102 and captions["tokens"]["least"] == 4
    assert captions["beyond_context"] == {"context": 77, "count": 1, "share": 0.1}
    assert found["negatives"]["count"] == 2 and found["negatives"]["captions_without"] == 8
    assert found["negatives"]["kinds"] == {kind: {"count": 1, "captions": 1, "share": 0.1} for kind in ("swap", "")}
    pictures = found["pictures"]
    assert pictures["formats"] == {"JPEG": 5, "PNG": 2}
    assert (pictures["width"]["least"], pictures["width"]["greatest"]) == (10, 32)
    assert (pictures["aspect"]["least"], pictures["aspect"]["greatest"]) == (0.2, 1.6)
    assert found["groups"] == {"count": 3, "pairs": 4, "largest": 2}


def test_what_repeats(mixed: Path) -> None:
    repeats = statistics(mixed, workers=0, progress=False)["repeats"]
    captions, pictures = repeats["captions"], repeats["pictures"]
    # "a dog" four times in three pairs, "only here" twice in one
    assert (captions["distinct"], captions["repeated"], captions["shared_by_pairs"]) == (6, 4, 4)
    assert captions["examples"] == [{"text": "a dog", "times": 4, "where": ["m-0.tar/a1", "m-0.tar/a2", "m-1.tar/b2"]}]
    # the first picture twice in one group, the second in two groups, the PNG twice without any
    assert (pictures["distinct"], pictures["repeated"], pictures["without_common_group"]) == (4, 3, 4)
    assert {tuple(e["where"]) for e in pictures["examples"]} == {
        ("m-0.tar/a1", "m-0.tar/a2"),
        ("m-0.tar/b1", "m-1.tar/b2"),
        ("m-1.tar/p1", "m-1.tar/p2"),
    }


def test_workers_change_nothing_but_the_time(mixed: Path) -> None:
    one, two = (statistics(mixed, workers=workers, progress=False) for workers in (0, 2))
    assert {k: v for k, v in one.items() if k != "epoch"} == {k: v for k, v in two.items() if k != "epoch"}


def test_a_sample_is_seeded_and_says_so(shard_folder: Path) -> None:
    def sampled(seed: int) -> dict:
        return statistics(shard_folder, sample=5, seed=seed, workers=0, progress=False)

    found = sampled(1)
    assert found["sample"] == {"pairs": 5, "seed": 1} and found["pairs"] == 23 and found["captions"]["count"] == 10
    assert {k: v for k, v in found.items() if k != "epoch"} == {k: v for k, v in sampled(1).items() if k != "epoch"}
    assert found["pictures"] != sampled(2)["pictures"]
    assert statistics(shard_folder, sample=99, workers=0, progress=False)["sample"] is None


def test_nothing_readable_is_the_users_mistake(tmp_path: Path) -> None:
    write_shard([Sample("a", b"none", "jpg", ["text"])], tmp_path / "x.tar")
    with pytest.raises(UserError, match="no pair of 1 can be read"):
        statistics(tmp_path, workers=0, progress=False)


def test_a_spread_is_numpys() -> None:
    values = np.random.default_rng(3).poisson(9, 1000)
    found = spread(Counter(values.tolist()))
    assert found["mean"] == round(values.mean(), 3) and (found["least"], found["greatest"]) == (
        values.min(),
        values.max(),
    )
    for name, q in (("q5", 0.05), ("q50", 0.5), ("q95", 0.95), ("q99", 0.99)):
        assert found[name] == np.quantile(values, q, method="inverted_cdf")


def test_the_pace_says_what_it_measured(shard_folder: Path, tmp_path: Path) -> None:
    found = pace(Index.load(shard_folder), workers=0, negatives=2, size=16)
    assert found["sample"] == 4 * 23 and found["seconds"] > 0 and found["negatives"] == 2
    write_shard([sample(0)], tmp_path / "one.tar")
    assert pace(Index.load(tmp_path), workers=1, negatives=0, size=16)["sample"] == 64
