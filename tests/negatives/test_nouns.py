"""Nouns of captions as tags, and shards with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from clipkit.data.build import Sample, encode_jpeg, write_shard
from clipkit.data.shards import Index
from clipkit.errors import UserError
from clipkit.negatives.nouns import Nouns, add_nouns, nouns


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Two dogs and three quokkas run past the old fence .", ["dog", "quokka", "fence"]),
        ("a police officer on his motorcycle in front of skyscrapers", ["police officer", "motorcycle", "skyscraper"]),
        ("a dog without a leash, and no cat", ["dog"]),
        ("a man with glasses, a woman and another man", ["man", "glasses", "woman"]),
        ("sleeping", []),
    ],
)
def test_nouns(caption: str, expected: list[str]) -> None:
    assert nouns(caption) == expected


def test_shards_with_nouns(tmp_path: Path) -> None:
    picture = encode_jpeg(Image.new("RGB", (8, 8)))
    extra = {"tags": ["Lawn"], "label": 0, "negatives": [[{"text": "a cat"}]]}
    first = Sample("a", picture, "jpg", ["a dog", "two dogs and two quokkas"], extra, {"negative0.jpg": picture})
    write_shard([first, Sample("b", picture, "jpg", ["sleeping"])], tmp_path / "x-0.tar")
    write_shard([Sample("c", picture, "jpg", ["a boat"])], tmp_path / "x-1.tar")
    report = add_nouns(tmp_path / "x-*.tar", tmp_path / "out", workers=1, progress=False)
    assert report == Nouns(shards=2, pairs=3, tags=4, untagged=1, unlisted=1)  # of quokkas the lexicon knows nothing
    old, new = Index.load(tmp_path / "x-0.tar"), Index.load(tmp_path / "out/x-0.tar")
    for id in range(2):
        before, after = old.read(id), new.read(id)
        sheet = json.loads(before.pop("json"))
        assert json.loads(after.pop("json")) == sheet | {"tags": [["lawn", "dog", "quokka"], []][id]}
        assert after == before
    with pytest.raises(UserError, match=r"x-0\.tar: is there already"):
        add_nouns(tmp_path / "x-*.tar", tmp_path / "out", workers=1, progress=False)
    with pytest.raises(UserError, match="the shards themselves lie here"):
        add_nouns(tmp_path / "x-*.tar", tmp_path, overwrite=True, progress=False)
    again = add_nouns(tmp_path / "x-*.tar", tmp_path / "out", workers=1, overwrite=True, progress=False)
    assert again == report
