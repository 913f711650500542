"""Everything a shard may say about a pair beside one picture and one caption, and what the batch makes of it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.data.build import Sample, encode_jpeg, write_shard, write_shards
from clipkit.data.decode import Preprocess, decode
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.reader import kind_number
from clipkit.data.reshard import reshard
from clipkit.data.shards import Index
from clipkit.data.sources import tar
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.settings import DataConfig

from .conftest import noise_picture

CAPTIONS = ["kurz {n}", "a short one {n}", "a long one about picture number {n}", "another short one {n}"]
KINDS = ["de", "short", "long", "short"]


def rich_sample(n: int) -> Sample:
    """Four captions of three kinds; the second has three negatives, two of them with pictures."""
    negatives = [
        [{"text": f"kein {n}", "kind": "swap"}],
        [
            {"text": f"no picture {n}", "kind": "replace", "source": "rules"},
            {"text": f"pictured one {n}", "kind": "swap", "picture": 1},
            {"text": f"pictured zero {n}", "kind": "swap", "picture": 0},
        ],
    ]
    extra = {"negatives": negatives, "caption_kinds": KINDS, "relevance": [0.5, 1, 2, 1], "group": f"g{n // 2}"}
    pictures = {f"negative{j}.jpg": encode_jpeg(noise_picture(100 + 10 * n + j)) for j in range(2)}
    captions = [caption.format(n=n) for caption in CAPTIONS]
    return Sample(f"k{n}", encode_jpeg(noise_picture(n)), "jpg", captions, extra, pictures)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("rich")
    write_shards(map(rich_sample, range(6)), folder, per_shard=4, progress=False)
    return Index.load(folder)


@pytest.fixture(scope="module")
def batches() -> Callable[..., list[Batch]]:
    tokenizer = Tokenizer()

    def load(index: Index, steps: int = 1, **data: Any) -> list[Batch]:
        config = configuration.validate({"data": {"workers": 0, "augment": "none", **data}}).data
        plan = Plan(index, batch_size=len(index), lanes=1)
        preprocess = Preprocess(16)
        return list(
            Loader(index, plan, data=config, preprocess=preprocess, tokenizer=tokenizer, seed=3).steps(0, steps)
        )

    return load


@cache
def speller() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


def words(tokens: torch.Tensor) -> str:
    """Token ids back into text."""
    return speller().decode([t for t in tokens.tolist() if t not in (0, 49406, 49407)]).strip()


def test_captions_are_chosen_by_the_chance_of_their_kind(rich: Index, batches: Callable[..., list[Batch]]) -> None:
    drawn: Counter[str] = Counter()
    for batch in batches(rich, 100, caption_kinds={"short": 1, "long": 4, "de": 0}):
        drawn.update(words(text).rsplit(" ", 1)[0] for text in batch.text)
    assert set(drawn) == {"a short one", "another short one", "a long one about picture number"}
    assert abs(drawn["a long one about picture number"] / 600 - 4 / 6) < 0.06
    with pytest.raises(UserError, match=r"no caption of the wanted kinds: wanted tiny, found de, long, short"):
        batches(rich, caption_kinds={"tiny": 1})


def test_all_takes_each_caption_once_in_as_many_epochs(rich: Index, batches: Callable[..., list[Batch]]) -> None:
    found: dict[int, list[str]] = {}
    for batch in batches(rich, 8, caption="all"):
        for id, text in zip(batch.id.tolist(), batch.text):
            found.setdefault(id, []).append(words(text))
    for id, texts in found.items():
        expected = sorted(caption.format(n=id) for caption in CAPTIONS)
        assert sorted(texts[:4]) == expected == sorted(texts[4:])
    assert len({tuple(text.rsplit(" ", 1)[0] for text in texts) for texts in found.values()}) > 1


def test_positives_are_other_captions_of_the_picture_kinds_in_turn(
    rich: Index, batches: Callable[..., list[Batch]]
) -> None:
    (batch,) = batches(rich, positives=5)
    assert batch.positive_text is not None and batch.positive_valid is not None
    assert batch.positive_text.shape[:2] == (6, 5) and batch.positive_valid.sum(1).tolist() == [3] * 6
    for id, text, positives in zip(batch.id.tolist(), batch.text, batch.positive_text):
        found = sorted([words(text), *map(words, positives[:3])])
        assert found == sorted(caption.format(n=id) for caption in CAPTIONS)
        assert not positives[3:].any()
    (batch,) = batches(rich, positives=2, caption_kinds={"short": 1}, positive_kinds=["long", "de"])
    assert batch.positive_text is not None
    for id, positives in zip(batch.id.tolist(), batch.positive_text):
        assert sorted(map(words, positives)) == sorted([f"a long one about picture number {id}", f"kurz {id}"])


def test_negatives_bring_their_kind_and_their_picture(rich: Index, batches: Callable[..., list[Batch]]) -> None:
    chosen = {"caption_kinds": {"short": 1}, "caption": "first"}
    (batch,) = batches(rich, negatives=4, negative_images=3, **chosen)
    assert batch.negative_text is not None and batch.negative_image is not None and batch.valid is not None
    assert batch.negative_kind is not None and batch.negative_image_valid is not None
    assert batch.negative_image_valid.tolist() == [[True, True, False]] * 6
    assert batch.valid.tolist() == [[True, True, True, False]] * 6
    assert batch.kinds == {kind_number(kind): kind for kind in ("swap", "replace")}
    swap, replace = kind_number("swap"), kind_number("replace")
    assert batch.negative_kind.tolist() == [[swap, swap, replace, -1]] * 6
    for id, texts, pictures in zip(batch.id.tolist(), batch.negative_text, batch.negative_image):
        members = rich.read(id)
        for text, picture in zip(texts[:2], pictures[:2]):
            number = {"zero": 0, "one": 1}[words(text).split()[1]]
            assert torch.equal(picture, decode(members[f"negative{number}.jpg"], Preprocess(16)))
        assert words(texts[2]) == f"no picture {id}" and not pictures[2].any()
    (batch,) = batches(rich, negatives=4, negative_kinds=["replace"], **chosen)
    assert (
        batch.valid is not None and batch.valid.sum(1).tolist() == [1] * 6 and set(batch.kinds.values()) == {"replace"}
    )


def test_relevance_belongs_to_the_caption(rich: Index, batches: Callable[..., list[Batch]]) -> None:
    for kind, expected in (("de", 0.5), ("long", 2.0)):
        (batch,) = batches(rich, caption_kinds={kind: 1})
        assert batch.relevance is not None and batch.relevance.tolist() == [expected] * 6


def test_a_picture_that_is_named_and_missing_is_unreadable(tmp_path: Path, batches: Callable[..., list[Batch]]) -> None:
    lacking = rich_sample(0)
    del lacking.negative_images["negative1.jpg"]
    write_shard([lacking, rich_sample(2)], tmp_path / "x.tar")
    settings = {"negatives": 3, "negative_images": 2, "caption": "first", "caption_kinds": {"short": 1}}
    with pytest.raises(
        UserError, match=r"k0: missing negative picture: a negative names picture 1, there is no KEY\.neg"
    ):
        batches(Index.load(tmp_path / "x.tar"), **settings)
    (batch,) = batches(Index.load(tmp_path / "x.tar"), on_error="skip", **settings)
    assert batch.id.tolist() == [1, 1]


def test_pairs_that_are_really_called_negative_stay_pairs(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    members = [(f"{key}.{suffix}", b"x") for key in ("a", "a.negative0") for suffix in ("jpg", "txt")]
    index = Index.load(write_tar([*members, ("a.negative1.jpg", b"n")]))
    assert [index.key(id) for id in range(len(index))] == ["a", "a.negative0"]
    assert set(index.read(0)) == {"jpg", "txt", "negative1.jpg"}


def test_all_of_it_survives_resharding_and_rebuilding(rich: Index, tmp_path: Path) -> None:
    reshard([str(path) for path in rich.shards], tmp_path / "new", short_side=20, workers=1, progress=False)
    again = Index.load(tmp_path / "new")
    assert "negative1.jpg" in again.read(3) and decode(again.read(3)["negative1.jpg"], Preprocess(16)).shape[1] == 16
    assert len(again.read(3)["negative1.jpg"]) < len(rich.read(3)["negative1.jpg"])
    for sample, n in zip(tar(rich.shards[0].parent), range(6)):
        expected = rich_sample(n)
        assert sample.negative_images == expected.negative_images and sample.extra == expected.extra


def test_settings_that_cannot_be_right() -> None:
    with pytest.raises(UserError) as caught:
        configuration.validate(
            {
                "model": {"lock_image": True},
                "data": {
                    "negatives": 1, "negative_images": 2, "caption": "all", "caption_kinds": {"a": 2.0, "b": 0},
                    "cache_image_features": True, "augment": "none",
                },
            }
        )  # fmt: skip
    assert str(caught.value).splitlines()[1:] == [
        "  data.negative_images: 2 pictures of 1 negatives; raise data.negatives",
        "  data.negative_images: cannot be read beside data.cache_image_features",
        "  data.caption_kinds.a: with data.caption: all every kind has its turn; should be 1, got 2.0",
    ]
    with pytest.raises(UserError, match="no kind has a chance above 0"):
        configuration.validate({"data": {"caption_kinds": {"a": 0}}})
    assert DataConfig().caption_kinds == {}


def looking_alike(folder: Path, alternates: Callable[[int], Any]) -> Index:
    """Six pairs in two shards, which name others."""
    samples = [
        Sample(f"k{n}", encode_jpeg(noise_picture(n)), "jpg", [f"number {n}"], {"alternates": alternates(n)})
        for n in range(6)
    ]
    write_shards(samples, folder, per_shard=4, progress=False)
    return Index.load(folder)


def test_every_pair_brings_one_that_looks_alike(batches: Callable[..., list[Batch]], tmp_path: Path) -> None:
    """Behind the others, in their order, with a caption of its own; another one in another epoch."""
    index = looking_alike(tmp_path / "alike", lambda n: [f"k{(n + 1) % 6}", f"k{(n + 2) % 6}", "elsewhere"])
    tokenizer, steps = Tokenizer(), {}
    for batch in batches(index, 12, alternates=True):
        first, second = batch.id.split(6)
        assert sorted(first.tolist()) == list(range(6)) and set(((second - first) % 6).tolist()) <= {1, 2}
        assert torch.equal(batch.text, tokenizer([f"number {id}" for id in batch.id.tolist()]))
        assert batch.image is not None and len(batch.image) == len(batch.group) == 12
        for a, b in zip(first.tolist(), second.tolist()):
            steps.setdefault(a, set()).add(b)
    assert all(len(found) == 2 for found in steps.values())
    plain = batches(index)[0]
    assert torch.equal(plain.id, batches(index, alternates=True)[0].id[:6])


def test_a_pair_without_one_that_looks_alike(batches: Callable[..., list[Batch]], tmp_path: Path) -> None:
    for number, found in enumerate(([], ["elsewhere"])):
        index = looking_alike(tmp_path / str(number), lambda n, found=found: found)
        with pytest.raises(UserError, match=r"/k\d: data.alternates needs the key of a similar pair of data.train"):
            batches(index, alternates=True)
        assert len(batches(index)[0]) == 6
    broken = looking_alike(tmp_path / "broken", lambda n: "k1")
    with pytest.raises(UserError, match=r"broken json: alternates should be a list of keys, found 'k1'"):
        batches(broken)
    same = looking_alike(tmp_path / "same", lambda n: ["k1"])
    shard = tmp_path / "same" / same.shards[0].name
    shutil.copy(shard, tmp_path / "same" / "z.tar")
    with pytest.raises(UserError, match="another shard has this key too"):
        batches(Index.load(tmp_path / "same"), alternates=True)
