"""Shards cut anew: the same pairs in the same order, smaller pictures, resumable, the same whatever the workers."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipkit.data.build import encode_jpeg
from clipkit.data.reshard import reshard
from clipkit.data.shards import Index
from clipkit.errors import UserError

from .conftest import noise_picture


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


@pytest.fixture
def old(write_tar: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Two shards that number their pairs alike; a small picture, a PNG, a group and negatives among them."""
    sheet = {
        "captions": ["one", "two"],
        "negatives": [[{"text": "eno", "kind": "x"}], []],
        "group": "g",
        "scene": {"a": 1},
    }
    png = io.BytesIO()
    noise_picture(3, 30, 40).save(png, "PNG")
    first = [
        ("0.jpg", encode_jpeg(noise_picture(1, 120, 80))), ("0.json", json.dumps(sheet).encode()),
        ("1.png", png.getvalue()), ("1.txt", b"three"),
    ]  # fmt: skip
    second = [("0.jpg", encode_jpeg(noise_picture(2, 64, 100))), ("0.txt", b"four")]
    return [write_tar(first, "a.tar"), write_tar(second, "b.tar")]


def test_pairs_stay_and_pictures_shrink(old: list[Path], tmp_path: Path) -> None:
    report = reshard(old, tmp_path / "new", short_side=48, per_shard=5, workers=1, progress=False)
    assert (report.shards, report.kept, report.samples, report.smaller) == (1, 0, 3, 2)
    index = Index.load(tmp_path / "new")
    assert [index.key(id) for id in range(3)] == ["a/0", "1", "b/0"]
    rows = [index.read(id) for id in range(3)]
    assert json.loads(rows[0]["json"]) == {
        "captions": ["one", "two"], "negatives": [[{"text": "eno", "kind": "x"}], []], "group": "g", "scene": {"a": 1},
    }  # fmt: skip
    assert [rows[i]["txt"] for i in range(3)] == [b"one", b"three", b"four"]
    assert Image.open(io.BytesIO(rows[0]["jpg"])).size == (72, 48)
    assert rows[1]["png"] == Index.load(old).read(1)["png"]
    assert Image.open(io.BytesIO(rows[2]["jpg"])).size == (48, 75)


def test_resumed_or_with_more_workers_the_same_bytes(old: list[Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"short_side": 48, "per_shard": 1, "progress": False}
    reshard(old, tmp_path / "one", workers=1, **settings)
    reshard(old, tmp_path / "two", workers=2, **settings)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") and len(hashes(tmp_path / "one")) == 3
    (tmp_path / "two/shard-000001.tar").unlink()
    report = reshard(old, tmp_path / "two", workers=1, **settings)
    assert (report.kept, report.samples) == (2, 1) and hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_folder_made_otherwise_is_refused(old: list[Path], tmp_path: Path) -> None:
    reshard(old, tmp_path / "new", short_side=48, workers=1, progress=False)
    with pytest.raises(UserError, match="short_side: 48 there, 32 now"):
        reshard(old, tmp_path / "new", short_side=32, workers=1, progress=False)
    (tmp_path / "new/reshard.json").unlink()
    with pytest.raises(UserError, match="holds shards called shard-"):
        reshard(old, tmp_path / "new", short_side=48, workers=1, progress=False)


def test_unreadable_pairs_are_an_error_or_counted(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    good = encode_jpeg(noise_picture(1, 60, 60))
    members = [("0.jpg", good[:400]), ("0.txt", b"a"), ("1.jpg", good), ("1.txt", b"b")]
    shard = write_tar(members)
    with pytest.raises(UserError, match=r"x\.tar/0: unreadable picture: .*; mend the shard"):
        reshard(shard, tmp_path / "new", workers=1, progress=False)
    assert not list((tmp_path / "new").glob("*.tar*"))
    report = reshard(shard, tmp_path / "new", on_error="skip", workers=1, progress=False)
    assert report.samples == 1 and report.skipped == {"unreadable picture": 1}
