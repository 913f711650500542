"""Everything is embedded once, at any number of ranks; errors name the picture."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from PIL import Image

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Picture
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.roots import Roots
from tests.evaluation.fakes import Random, name_of, picture
from tests.ranks import run_ranks


@pytest.fixture
def folder(tmp_path):
    for n in range(7):
        picture(n).save(tmp_path / f"{n}.png")
    return tmp_path


def pictures(n):
    return [Picture("here", f"{i}.png") for i in range(n)]


def test_once_each(folder):
    model = Random()
    embedder = Embedder(model, Roots({"here": folder}), batch_size=3)
    first = embedder.pictures([*pictures(5), *pictures(5)])
    again = embedder.pictures(pictures(7))
    assert len(model.seen) == len(set(model.seen)) == 7
    assert (first[:5] == again[:5]).all() and (first[5:] == first[:5]).all()
    assert max(model.batches) <= 3
    embedder.texts(["a", "b", "a"])
    embedder.texts(["b", "c"])
    assert sorted(model.seen[7:]) == ["a", "b", "c"]


def test_fp32_of_unit_length_in_the_order_asked(folder):
    model = Random()
    rows = Embedder(model, Roots({"here": folder}), batch_size=2).pictures(pictures(7)[::-1])
    expected = np.stack([model.vector(name_of(picture(n))) for n in range(7)][::-1])
    assert rows.dtype == np.float32
    assert np.allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_texts_go_longest_first():
    model = Random()
    Embedder(model, Roots(), batch_size=1).texts(["aa", "a", "aaa"])
    assert model.seen == ["aaa", "aa", "a"]


def test_crops_are_pictures_of_their_own(folder):
    embedder = Embedder(Random(), Roots({"here": folder}))
    crop = embedder.open(Picture("here", "0.png", (8.0, 2.0, 8.0, 5.0)))
    assert crop.size == (8, 5)
    inside, outside = np.array(crop)[:, :4], np.array(crop)[:, 4:]
    assert (inside == np.array(picture(0))[2:7, 8:12]).all() and not outside.any()
    rows = embedder.pictures([Picture("here", "0.png"), Picture("here", "0.png", (8.0, 2.0, 8.0, 5.0))])
    assert (rows[0] != rows[1]).any()


def test_unreadable_picture_is_named(folder):
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot read picture here:3.png"):
        Embedder(Random(), Roots({"here": folder})).pictures(pictures(7))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.full((1, 4), np.nan), "not finite for 1 of 1 texts"),
        (np.ones(4), r"shape \(4,\)"),
        (np.ones((2, 4)), "2, 4"),
    ],
)
def test_model_that_gives_nonsense(rows, message):
    model = Random()
    model.embed_texts = lambda texts: rows
    with pytest.raises(UserError, match=message):
        Embedder(model, Roots()).texts(["a"])


def test_torch_rows_are_taken():
    import torch

    model = Random()
    model.embed_texts = lambda texts: torch.full((len(texts), 4), 2.0, dtype=torch.bfloat16, requires_grad=True)
    assert Embedder(model, Roots()).texts(["a"]).tolist() == [[0.5] * 4]


def _on_ranks(folder, rank, world):
    model = Random()
    embedder = Embedder(model, Roots({"here": folder}), batch_size=2)
    return embedder.pictures(pictures(7)), embedder.texts(["only one"]), len(model.seen)


def test_ranks_share_the_work_and_all_know_the_result(folder):
    alone, one_text, _ = _on_ranks(folder, 0, 1)
    results = run_ranks(partial(_on_ranks, folder), 2)
    assert all((rows == alone).all() and (text == one_text).all() for rows, text, _ in results)
    assert sorted(seen for _, _, seen in results) == [3, 5]


def _one_rank_fails(folder, rank, world):
    with pytest.raises(UserError, match=r"here:1.png"):
        _on_ranks(folder, rank, world)


def test_an_error_on_one_rank_ends_all(folder):
    (folder / "1.png").write_bytes(b"no picture")
    run_ranks(partial(_one_rank_fails, folder), 2)


def test_greyscale_and_transparent_pictures_become_rgb(tmp_path):
    Image.new("L", (4, 4), 9).save(tmp_path / "grey.png")
    Image.new("RGBA", (4, 4), (9, 8, 7, 0)).save(tmp_path / "clear.png")
    embedder = Embedder(Random(), Roots({"here": tmp_path}))
    assert {embedder.open(Picture("here", name)).mode for name in ("grey.png", "clear.png")} == {"RGB"}


def test_a_model_that_makes_batches_itself_gets_many_texts():
    model = Random()
    Embedder(model, Roots(), batch_size=1).texts([str(n) for n in range(9)])
    assert max(model.batches) == 4
    model.batches, model.texts_at_once = [], 100  # type: ignore[attr-defined]
    Embedder(model, Roots(), batch_size=1).texts([str(n) for n in range(9)])
    assert model.batches == [9]
