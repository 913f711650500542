"""Embeddings in the shards: found beside their pair, drawn with their texts, refused when they are anything else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipkit.data.batch import Batch
from clipkit.data.build import encode_jpeg
from clipkit.data.check import check_shards
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.members import Unreadable, read_sheet
from clipkit.data.plan import Plan
from clipkit.data.reader import Reader
from clipkit.data.shards import Index
from clipkit.data.stored import read_rows
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.negatives.make import make
from clipkit.settings import DataConfig

from .conftest import noise_picture

CAPTIONS, NEGATIVES = 3, (2, 0, 1)


def npy(rows: Any, dtype: Any = np.float16) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(rows, dtype=dtype))
    return file.getvalue()


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return file.getvalue()


def text_rows(n: int, count: int) -> np.ndarray:
    """Row r of pair n: [n, r, 1]; every text is told by its row."""
    return np.array([[n, r, 1] for r in range(count)], dtype=np.float32).reshape(count, 3)


def members(n: int) -> list[tuple[str, bytes]]:
    """Three captions with two, no and one negatives; two sets, the second a teacher's."""
    sheet = {
        "captions": [f"pair {n} caption {c}" for c in range(CAPTIONS)],
        "caption_kinds": ["a", "b", "c"],
        "negatives": [[{"text": f"pair {n} not {c} {i}"} for i in range(k)] for c, k in enumerate(NEGATIVES)],
    }
    return [
        (f"x/k.{n}.jpg", encode_jpeg(noise_picture(n))),
        (f"x/k.{n}.json", json.dumps(sheet).encode()),
        (f"x/k.{n}.llm.text.npy", npy(text_rows(n, CAPTIONS))),
        (f"x/k.{n}.llm.negatives.npy", npy(text_rows(n, 3) + 10, np.float32)),
        (f"x/k.{n}.clip-b.text.npy", npy(text_rows(n, CAPTIONS)[:, :2] * 2)),
        (f"x/k.{n}.clip-b.image.npy", npy([n, -1])),
        (f"x/k.{n}.clip-b.negatives.npy", npy(text_rows(n, 3)[:, :2] * 3)),
        (f"x/k.{n}.other.npy", b"not ours"),
    ]


@pytest.fixture
def shard(write_tar: Callable[..., Path]) -> Path:
    return write_tar([member for n in range(4) for member in members(n)])


def batch(shard: Path, roles: tuple[str, ...] = (), **data: Any) -> Batch:
    index = Index.load(shard)
    config = DataConfig(workers=0, augment="none", **data)
    loader = Loader(
        index, Plan(index, batch_size=4, lanes=1), data=config, preprocess=Preprocess(16), tokenizer=Tokenizer(),
        seed=2, teacher_roles=roles,
    )  # fmt: skip
    return next(iter(loader.steps(0, 1)))


def test_they_belong_to_their_pair(shard: Path):
    index = Index.load(shard)
    assert len(index) == 4 and not index.problems and index.key(0) == "x/k.0"
    assert set(index.read(0)) == {
        "jpg", "json", "llm.text.npy", "llm.negatives.npy", "clip-b.text.npy", "clip-b.image.npy",
        "clip-b.negatives.npy",
    }  # fmt: skip
    assert check_shards(shard, progress=False)["usable"] == 4


def test_a_batch_holds_the_rows_of_its_texts(shard: Path):
    roles = ("image", "text", "positive_text", "negative_text")
    b = batch(shard, roles, text_features="llm", teacher_features="clip-b", negatives=3, positives=2)
    sheets = {n: read_sheet({s.split(".", 2)[2]: d for s, d in members(n)}) for n in range(4)}
    assert b.text_features is not None and b.text_features.dtype == torch.float32
    assert b.positive_text_features is not None and b.negative_text_features is not None
    assert b.teacher_text is not None and b.teacher_positive_text is not None and b.teacher_negative_text is not None
    assert b.teacher_image is not None and b.valid is not None
    tokenizer = Tokenizer()
    for row, id in enumerate(b.id.tolist()):
        pair, caption, _ = (int(x) for x in b.text_features[row])
        assert pair == id and words(tokenizer, b.text[row]) == sheets[id].captions[caption]
        others = [int(x) for x in b.positive_text_features[row, :, 1]]
        assert sorted([caption, *others]) == [0, 1, 2]
        before, own = sum(NEGATIVES[:caption]), NEGATIVES[caption]
        rows = [int(x) - 10 for x in b.negative_text_features[row, :, 1][b.valid[row]]]
        assert sorted(rows) == list(range(before, before + own)) and b.valid[row].sum() == own
        assert not b.negative_text_features[row][~b.valid[row]].any()
        assert b.teacher_text[row].tolist() == [2 * id, 2 * caption]
        assert b.teacher_positive_text[row].tolist() == [[2 * id, 2 * c] for c in others]
        assert b.teacher_negative_text[row][b.valid[row]].tolist() == [[3 * id, 3 * r] for r in rows]
        assert b.teacher_image[row].tolist() == [id, -1]
    parts = b.split(2)
    assert parts[1].text_features is not None and torch.equal(parts[1].text_features, b.text_features[2:])


def words(tokenizer: Tokenizer, tokens: torch.Tensor) -> str:
    text = tokenizer._inner.decode([t for t in tokens.tolist() if t not in (0, 49406, 49407)]).strip()
    return " ".join(text.split())


def test_only_what_is_asked_for_is_read(shard: Path):
    index = Index.load(shard)
    plain = Reader(index, [range(4)], DataConfig(), Preprocess(16), 0, None)
    assert set(index.read(0, plain.wanted)) == {"jpg", "json"}
    stored = np.zeros((4, 2), dtype=np.float32)
    text = Reader(index, [range(4)], DataConfig(text_features="llm"), Preprocess(16), 0, stored)
    assert set(index.read(0, text.wanted)) == {"json", "llm.text.npy"}
    data = DataConfig(teacher_features="clip-b", negatives=1)
    teacher = Reader(index, [range(4)], data, Preprocess(16), 0, None, ("image",))
    assert set(index.read(0, teacher.wanted)) == {"jpg", "json", "clip-b.image.npy"}
    assert batch(shard).text_features is None and batch(shard).teacher_text is None


def test_positives_come_in_the_order_of_the_kinds_named(shard: Path):
    b = batch(shard, text_features="llm", caption_kinds={"c": 1}, positives=2, positive_kinds=["b", "a"])
    assert b.text_features is not None and b.text_features[:, 1].tolist() == [2] * 4
    assert b.positive_text_features is not None and b.positive_text_features[:, :, 1].tolist() == [[1, 0]] * 4


SHEET = read_sheet({"json": json.dumps({"captions": ["a", "b"], "negatives": [[{"text": "c"}]]}).encode()})
GOOD = npy(np.zeros((2, 3)))
BROKEN = {
    "nothing": (b"", "not a plain .npy"),
    "another file": (b"PK\x03\x04" + bytes(200), "not a plain .npy"),
    "cut off": (GOOD[:-2], r"bytes do not hold \[2, 3\] of float16"),
    "another shape": (npy(np.zeros((3, 3))), r"text should be \[2 f\], one row each, found \[3, 3\]"),
    "one row": (npy(np.zeros(3)), r"text should be \[2 f\]"),
    "objects": (npy(np.array([[None, 1], [2, 3]], dtype=object), object), "should be float16 or float32"),
    "doubles": (npy(np.zeros((2, 3)), np.float64), "should be float16 or float32 by rows, found float64"),
    "by column": (npy(np.asfortranarray(np.zeros((2, 3)))), "by rows"),
    "too large": (header((2, 3 * 10**15)) + bytes(12), r"140 bytes do not hold \[2, 3000000000000000\]"),
    "not finite": (npy(np.full((2, 3), np.nan)), "not all of them are finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_a_table_of_the_right_shape_is_refused(case: str):
    data, reason = BROKEN[case]
    with pytest.raises(Unreadable, match=reason):
        read_rows(data, "text", SHEET)
    assert read_rows(GOOD, "text", SHEET).shape == (2, 3)
    assert read_rows(npy(np.ones((1, 3))), "negatives", SHEET).shape == (1, 3)
    assert read_rows(npy(np.ones(5)), "image", SHEET).shape == (5,)


def test_a_missing_or_broken_table_ends_a_run_or_is_skipped(write_tar: Callable[..., Path]):
    lines = [member for n in range(4) for member in members(n)]
    short = [(name, npy(text_rows(2, 2)) if name == "x/k.2.llm.text.npy" else data) for name, data in lines]
    path = write_tar([member for member in short if member[0] != "x/k.1.llm.text.npy"])
    with pytest.raises(
        UserError, match="missing features: there is no KEY.llm.text.npy; `clipkit shards embed`|broken"
    ):
        batch(path, text_features="llm")
    b = batch(path, text_features="llm", on_error="skip")
    assert {reason.partition(":")[0] for _, reason in b.skipped} == {"missing features", "broken features"}
    found = check_shards(path, progress=False)
    assert found["reasons"] == {"broken features": 1}


def test_rows_of_two_widths_do_not_make_a_batch(write_tar: Callable[..., Path]):
    lines = [member for n in range(4) for member in members(n)]
    wide = npy(np.ones((CAPTIONS, 5)))
    path = write_tar([(name, wide if name == "x/k.3.llm.text.npy" else data) for name, data in lines])
    with pytest.raises(UserError, match="text_features: pairs of one batch hold rows of 3 and 5; embed them alike"):
        batch(path, text_features="llm")


def test_new_negatives_leave_the_old_ones_rows_behind(shard: Path, tmp_path: Path):
    make(shard, tmp_path / "made", kinds=["reshuffle"], workers=1)
    found = set(Index.load(tmp_path / "made").read(0))
    assert {"llm.text.npy", "clip-b.image.npy"} <= found and not any("negatives" in name for name in found)
