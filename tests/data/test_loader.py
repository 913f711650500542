"""The stream: the same batches for every world size, worker count and starting point; nothing lost in silence."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipkit.data.batch import Batch
from clipkit.data.build import Sample, encode_jpeg, write_shard
from clipkit.data.decode import Preprocess, decode, fit, read_picture, to_pixels
from clipkit.data.features import FeatureStore
from clipkit.data.loader import Loader, check_first
from clipkit.data.plan import Plan
from clipkit.data.reader import NAMED_GROUP, draw
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.settings import DataConfig

from .conftest import noise_picture, sample

# Three workers on two cores are wanted here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
Writer = Callable[..., Path]
BATCH = 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def load(index: Index, tokenizer: Tokenizer) -> Callable[..., Loader]:
    """A loader over the small shards; settings of the data section by name."""

    def build(
        of: Index = index, rank: int = 0, world: int = 1, features: Any = None, batch: int = BATCH, **data: Any
    ) -> Loader:
        config = DataConfig(**{"workers": 0, "negatives": 2, **data})
        plan = Plan(of, batch_size=batch, seed=5, lanes=4, window=3)
        return Loader(
            of, plan, data=config, preprocess=Preprocess(16), tokenizer=tokenizer, seed=5, rank=rank, world=world,
            features=features,
        )  # fmt: skip

    return build


def tensors(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name."""
    return {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}


def assert_same(a: Batch, b: Batch) -> None:
    """Bit for bit."""
    assert tensors(a).keys() == tensors(b).keys()
    assert all(torch.equal(value, tensors(b)[name]) for name, value in tensors(a).items())


def joined(shares: list[Batch]) -> dict[str, list]:
    """The ranks' shares as one batch; texts without their padding, which each rank cuts for itself."""
    out: dict[str, list] = {}
    for share in shares:
        for name, value in tensors(share).items():
            trimmed = name in ("text", "negative_text")
            out.setdefault(name, []).extend(
                [[token for token in row if token] for row in value.reshape(-1, value.shape[-1]).tolist()]
                if trimmed
                else value.tolist()
            )
    return out


def test_a_batch_is_what_it_says(load: Callable[..., Loader], index: Index, tokenizer: Tokenizer) -> None:
    (batch,) = load(augment="none", caption="first").steps(0, 1)
    assert (
        len(batch) == BATCH
        and batch.id.tolist() == Plan(index, batch_size=BATCH, seed=5, lanes=4, window=3).ids(0, 0).tolist()
    )
    assert batch.image is not None and batch.image.dtype == torch.uint8 and batch.image.shape == (BATCH, 3, 16, 16)
    assert torch.equal(batch.group, batch.id) and batch.skipped == []
    assert batch.negative_text is not None and batch.valid is not None and batch.valid.all()
    assert batch.negative_text.shape == (BATCH, 2, batch.text.shape[1])
    for row, id in enumerate(batch.id.tolist()):
        record = json.loads(index.read(id)["json"])
        assert torch.equal(batch.image[row], decode(index.read(id)["jpg"], Preprocess(16)))
        words = tokenizer([record["captions"][0]])[0]
        assert batch.text[row][: len(words)].tolist() == words.tolist() and not batch.text[row][len(words) :].any()
        allowed = [tokenizer([n["text"]])[0].tolist() for n in record["negatives"][0]]
        found = [[t for t in negative if t] for negative in batch.negative_text[row].tolist()]
        assert all(negative in allowed for negative in found) and found[0] != found[1]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_world_and_any_workers_give_the_same_global_batches(
    load: Callable[..., Loader], world: int, workers: int
) -> None:
    expected = [joined([batch]) for batch in load().steps(0, 5)]
    ranks = [load(rank=rank, world=world, workers=workers).steps(0, 5) for rank in range(world)]
    found = [joined(list(shares)) for shares in zip(*ranks)]
    assert found == expected


def test_any_starting_point_gives_the_same_batches_over_epochs(load: Callable[..., Loader]) -> None:
    whole = list(load().steps(0, 9))  # 2 batches an epoch
    assert len({tuple(batch.id.tolist()) for batch in whole}) == 9
    for start in range(9):
        for offset, batch in enumerate(load(workers=start % 3 == 2).steps(start, 9)):
            assert_same(batch, whole[start + offset])


def test_each_sample_at_most_once_an_epoch(load: Callable[..., Loader]) -> None:
    for epoch in range(4):
        ids = [id for batch in load().steps(2 * epoch, 2 * epoch + 2) for id in batch.id.tolist()]
        assert len(ids) == len(set(ids)) == 16


def test_captions_negatives_and_crops_vary_over_epochs(load: Callable[..., Loader]) -> None:
    seen: dict[int, Counter] = {}
    for batch in load(crop_scale=0.3).steps(0, 40):
        assert batch.image is not None
        for row, id in enumerate(batch.id.tolist()):
            crop = batch.image[row].sum().item()
            seen.setdefault(id, Counter()).update([("text", tuple(batch.text[row].tolist())), ("crop", crop)])
    assert len(seen) == 23
    for counts in seen.values():
        assert {kind for kind, _ in counts} == {"text", "crop"}
        captions = {tuple(t for t in text if t) for kind, text in counts if kind == "text"}
        assert len(captions) == 2 and sum(kind == "crop" for kind, _ in counts) > 5


def test_no_negatives(load: Callable[..., Loader]) -> None:
    (batch,) = load(negatives=0).steps(0, 1)
    assert batch.negative_text is None and batch.valid is None


def test_missing_negatives_are_padding(load: Callable[..., Loader]) -> None:
    for batch in load(negatives=5).steps(0, 4):
        assert batch.negative_text is not None and batch.valid is not None
        assert set(batch.valid.sum(1).tolist()) <= {1, 3}
        assert not batch.negative_text[~batch.valid].any() and (batch.negative_text[batch.valid][:, 0] > 0).all()
        assert (batch.valid.long().diff(dim=1) <= 0).all()


def texts(pool: list[dict], k: int, key: int) -> list[str]:
    return [drawn["text"] for drawn in draw(pool, k, key)]


def test_negatives_are_uniform_over_kinds_and_never_twice() -> None:
    pool = [{"text": f"{kind}{i}", "kind": kind} for kind, n in (("a", 50), ("b", 2), ("c", 1)) for i in range(n)]
    firsts: Counter[str] = Counter()
    for key in range(3000):
        drawn = texts(pool, 4, key)
        kinds = Counter(text[0] for text in drawn)
        assert len(set(drawn)) == 4 and kinds["a"] in (1, 2) and kinds["b"] in (1, 2) and kinds["c"] == 1
        firsts[texts(pool, 1, key)[0][0]] += 1
    assert all(900 < count < 1100 for count in firsts.values()) and len(firsts) == 3
    assert sorted(texts(pool, 100, 0)) == sorted(n["text"] for n in pool)
    assert texts([{"text": " "}], 3, 0) == [] and texts(pool, 0, 0) == []


def test_named_groups_are_equal_across_shards(load: Callable[..., Loader], tmp_path: Path) -> None:
    write_shard([sample(1, group="g"), sample(2)], tmp_path / "a.tar")
    write_shard([sample(3, group="g"), sample(4, group="h")], tmp_path / "b.tar")
    (batch,) = load(Index.load(tmp_path), batch=4).steps(0, 1)
    groups = dict(zip(batch.id.tolist(), batch.group.tolist()))
    assert groups[0] == groups[2] >= NAMED_GROUP and groups[3] >= NAMED_GROUP and groups[1] == 1
    assert len(set(groups.values())) == 3 and max(groups.values()) < 2**63


@pytest.fixture
def broken(write_tar: Writer) -> Index:
    """Twelve pairs, four of them unreadable."""
    good = encode_jpeg(noise_picture(1))
    members = [(f"{i:02d}.{s}", d) for i in range(12) for s, d in (("jpg", good), ("txt", b"some words"))]
    bad = {"03.jpg": good[: len(good) // 2], "07.jpg": b"no picture", "08.txt": b"  ", "11.jpg": b""}
    return Index.load(write_tar([(name, bad.get(name, data)) for name, data in members]))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_sample_ends_the_run_with_one_clear_message(
    load: Callable[..., Loader], broken: Index, workers: int
) -> None:
    with pytest.raises(UserError) as caught:
        list(load(broken, batch=12, workers=workers, negatives=0).steps(0, 1))
    message = str(caught.value)
    assert message.startswith(str(broken.shards[0])) and "data.on_error: skip" in message and "\n" not in message
    assert any(reason in message for reason in ("03: unreadable picture", "07: unreadable", "08: empty", "11: unread"))


def test_the_first_pairs_are_read_ahead(load: Callable[..., Loader], broken: Index, index: Index) -> None:
    plan = Plan(broken, batch_size=12, seed=5, lanes=4, window=3)
    with pytest.raises(UserError) as ahead:
        check_first(broken, plan, DataConfig())
    with pytest.raises(UserError) as then:
        list(load(broken, batch=12).steps(0, 1))
    assert str(ahead.value) == str(then.value)
    check_first(broken, plan, DataConfig(on_error="skip"))
    check_first(index, Plan(index, batch_size=BATCH, seed=5, lanes=4, window=3), DataConfig())


def test_or_is_replaced_by_the_next_and_counted(load: Callable[..., Loader], broken: Index) -> None:
    (whole,) = load(broken, batch=12, on_error="skip", negatives=0).steps(0, 1)
    planned = Plan(broken, batch_size=12, seed=5, lanes=4, window=3).ids(0, 0).tolist()
    replacement = {3: 4, 7: 9, 8: 9, 11: 0}
    assert whole.id.tolist() == [replacement.get(id, id) for id in planned]
    reasons = Counter((where, reason.partition(":")[0]) for where, reason in whole.skipped)
    picture, text = "unreadable picture", "empty caption"
    assert reasons == {
        ("x.tar/03", picture): 1,
        ("x.tar/07", picture): 1,
        ("x.tar/08", text): 2,  # met by itself and on the way from 07
        ("x.tar/11", picture): 1,
    }
    shares = [next(load(broken, r, 3, batch=12, workers=1, on_error="skip", negatives=0).steps(0, 1)) for r in range(3)]
    assert joined(shares) == joined([whole])
    assert sorted(s for share in shares for s in share.skipped) == sorted(whole.skipped)


def test_nothing_readable_is_an_error_even_when_skipping(load: Callable[..., Loader], write_tar: Writer) -> None:
    index = Index.load(write_tar([(f"{i}.{s}", b"x") for i in range(4) for s in ("jpg", "txt")]))
    with pytest.raises(UserError, match="unreadable"):
        list(load(index, batch=2, on_error="skip").steps(0, 1))


def test_the_batch_must_divide_over_the_ranks(load: Callable[..., Loader]) -> None:
    with pytest.raises(UserError, match="8 pairs cannot be split evenly over 3 ranks"):
        load(world=3)


def test_training_randomness_is_left_alone(load: Callable[..., Loader]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(load(workers=1).steps(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_stored_features_stand_in_for_pictures(load: Callable[..., Loader], index: Index, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features.npy")
    rows = store.create(len(index), 6)
    rows[:] = np.arange(len(index))[:, None]
    rows[4] = np.nan
    rows.flush()
    store.commit({"model": "m"})
    settings = {"augment": "none", "caption": "first", "on_error": "skip"}
    with_pictures = list(load(**settings).steps(0, 6))
    for features in (store, np.load(store.path)):
        for a, b in zip(with_pictures, load(features=features, workers=1, **settings).steps(0, 6)):
            assert b.image is None and b.image_features is not None and b.image_features.dtype == torch.float32
            assert torch.equal(b.image_features[:, 0].long(), b.id) and 4 not in b.id
            assert b.id.tolist() == [5 if id == 4 else id for id in a.id.tolist()]
            assert len(b.skipped) == (4 in a.id)
            kept = a.id != 4
            assert torch.equal(a.text[kept], b.text[kept])


def test_the_loader_pickles(load: Callable[..., Loader]) -> None:
    """Where processes are spawned, workers get a copy."""
    loader = load()
    for a, b in zip(pickle.loads(pickle.dumps(loader)).steps(0, 2), loader.steps(0, 2)):
        assert_same(a, b)


def test_scaled_decoding_is_asked_for(load: Callable[..., Loader], tmp_path: Path) -> None:
    """Near the exact pixels and not equal to them, the same for any number of workers, crops and all else alike."""
    pairs = (Sample(f"{i}", encode_jpeg(noise_picture(i, 64, 48)), "jpg", ["words"]) for i in range(8))
    write_shard(pairs, tmp_path / "x.tar")
    index = Index.load(tmp_path)
    for augment in ("crop", "none"):
        exact, scaled, others = (
            next(load(index, batch=8, augment=augment, **settings).steps(0, 1))
            for settings in ({}, {"decode": "scaled"}, {"decode": "scaled", "workers": 2})
        )
        assert_same(scaled, others)
        assert_same(dataclasses.replace(exact, image=None), dataclasses.replace(scaled, image=None))
        assert exact.image is not None and scaled.image is not None
        assert 0 < (exact.image.int() - scaled.image.int()).abs().float().mean() < 8


def test_workers_end_with_the_iteration(load: Callable[..., Loader]) -> None:
    steps: Iterator[Batch] = load(workers=2).steps(0, 50)
    next(steps)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = len(children.read_text().split()) if children.exists() else 0
    steps.close()  # type: ignore[attr-defined]
    assert not children.exists() or len(children.read_text().split()) <= before - 2


def test_real_photographs(load: Callable[..., Loader], shared: Path) -> None:
    index = Index.load(shared / "data" / "coco_val2017-000.tar")
    (batch,) = load(index, batch=16, negatives=1).steps(3, 4)
    assert batch.image is not None and batch.valid is not None and not batch.valid.any()
    original = to_pixels(read_picture(index.read(int(batch.id[0]))["jpg"]))
    mean = fit(original, Preprocess(16)).float().mean()
    assert abs(batch.image[0].float().mean() - mean) < 25


def test_batch_moves_as_a_whole(load: Callable[..., Loader]) -> None:
    (batch,) = load().steps(0, 1)
    moved = batch.to("cpu")
    assert_same(batch, moved)
    assert {f.name for f in dataclasses.fields(moved)} >= tensors(batch).keys()


@pytest.mark.gpu
def test_on_a_gpu_machine_batches_come_pinned(load: Callable[..., Loader]) -> None:
    for workers in (0, 1):
        (batch,) = load(workers=workers).steps(0, 1)
        assert all(tensor.is_pinned() for tensor in tensors(batch).values())
        assert_same(batch, batch.to("cuda").to("cpu"))
