"""Further views of a picture: crops of their own, the same whatever ranks and workers there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clipkit import config as configuration
from clipkit.data.augment import random_view
from clipkit.data.batch import Batch
from clipkit.data.decode import Preprocess, decode_view
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.settings import DataConfig

SEED, SIZE = 5, 16
Batches = Callable[..., list[Batch]]


@pytest.fixture
def batches(index: Index) -> Batches:
    """Three batches of eight from the small shards."""

    def load(rank: int = 0, world: int = 1, first: int = 0, **data: object) -> list[Batch]:
        config = configuration.validate({"data": {"workers": 0, "views": 2, "view_scale": 0.3, **data}}).data
        plan, own = Plan(index, batch_size=8, seed=SEED, lanes=4), {"rank": rank, "world": world}
        loader = Loader(
            index, plan, data=config, preprocess=Preprocess(SIZE), tokenizer=Tokenizer(), seed=SEED, **own
        )  # fmt: skip
        return list(loader.steps(first, 3))

    return load


def seen(batch: Batch) -> torch.Tensor:
    assert batch.view_image is not None
    return batch.view_image


def test_views_are_crops_by_seed_epoch_id_and_place(index: Index, batches: Batches):
    for step, batch in enumerate(batches()):
        assert seen(batch).shape == (8, 2, 3, SIZE, SIZE) and seen(batch).dtype == torch.uint8
        for row, id in enumerate(batch.id.tolist()):
            for place in range(2):
                key = (SEED, "view", step // (len(index) // 8), id, place)
                expected = decode_view(
                    index.read(id)["jpg"], lambda h, w, key=key: random_view(h, w, SIZE, 0.3, *key), Preprocess(SIZE)
                )
                assert torch.equal(seen(batch)[row, place], expected)
            assert not torch.equal(seen(batch)[row, 0], seen(batch)[row, 1])


@pytest.mark.parametrize("augment", ["none", "crop"])
@pytest.mark.parametrize("decode", ["exact", "scaled"])
def test_the_picture_itself_stays_as_it_is(batches: Batches, augment: str, decode: str):
    settings = {"augment": augment, "decode": decode}
    for with_views, without in zip(batches(**settings), batches(views=0, **settings)):
        assert without.view_image is None and with_views.image is not None and without.image is not None
        assert torch.equal(with_views.image, without.image) and torch.equal(with_views.text, without.text)


def test_ranks_workers_and_a_later_start_see_the_same(batches: Batches):
    whole = [seen(batch) for batch in batches()]
    shares = [batches(rank, 2, workers=rank) for rank in range(2)]
    assert all(torch.equal(x, torch.cat([seen(a), seen(b)])) for x, a, b in zip(whole, *shares))
    assert torch.equal(seen(batches(first=2)[0]), whole[2])
    assert torch.equal(torch.cat([seen(part) for part in batches()[0].split(4)]), whole[0])


def test_settings_that_cannot_be_right():
    tree = {
        "model": {"lock_image": True},
        "data": {"views": 1, "cache_image_features": True, "augment": "none"},
        "objective": {"fsc_local": {}},
    }
    with pytest.raises(UserError) as caught:
        configuration.validate(tree)
    assert str(caught.value).splitlines()[1:] == [
        "  objective.fsc_local needs data.negatives ≥ 1, got 0",
        "  objective.fsc_local needs patches; data.cache_image_features keeps none of them",
        "  data.views: cannot be read beside data.cache_image_features",
    ]
    with pytest.raises(UserError, match="objective.groco needs data.views ≥ 1, got 0"):
        configuration.validate({"objective": {"groco": {}}})
    assert DataConfig().views == 0
