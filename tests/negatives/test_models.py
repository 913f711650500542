"""What a model tells of negatives and pictures: scores, similar pairs; and pictures of negatives from elsewhere."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data.build import Sample, encode_jpeg, write_shard
from clipkit.data.decode import Preprocess
from clipkit.data.reader import Reader
from clipkit.data.shards import Index
from clipkit.errors import UserError
from clipkit.negatives.make import make
from clipkit.negatives.mining import Embedded, embed_pairs, mine, neighbours
from clipkit.negatives.nouns import add_nouns
from clipkit.negatives.pictures import attach, wishes
from clipkit.negatives.scoring import score_shards
from clipkit.settings import DataConfig
from tests.typed import well, wrong

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "pink": (255, 80, 80)}


class Colours:
    """Embeds a picture by its mean colour and a text by the colours it names: what it says is known."""

    def embed_images(self, images: Sequence[Any]) -> torch.Tensor:
        means = np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])
        return torch.nn.functional.normalize(torch.from_numpy(means), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [np.sum([COLOURS[w] for w in text.split() if w in COLOURS] or [(1, 1, 1)], 0) for text in texts]
        return torch.nn.functional.normalize(torch.tensor(np.array(rows), dtype=torch.float32), dim=1)


def pair(key: str, colour: str, negatives: Sequence[str] = (), **extra: Any) -> Sample:
    made = [{"text": f"a {other} square", "kind": "replace"} for other in negatives]
    data = encode_jpeg(Image.new("RGB", (16, 16), COLOURS[colour]), quality=95)
    return Sample(key, data, "jpg", [f"a {colour} square", ""], {"negatives": [made], **extra})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    write_shard([pair("a", "red", ["blue", "pink"]), pair("b", "blue", ["green"])], tmp_path / "in" / "x.tar")
    write_shard(
        [pair("c", "pink"), pair("d", "red", group="g"), pair("e", "red", group="g")], tmp_path / "in" / "y.tar"
    )
    return tmp_path / "in"


def sheets(folder: Path) -> list[dict[str, Any]]:
    index = Index.load(folder)
    return [json.loads(index.read(id)["json"]) for id in range(len(index))]


def test_scores_are_differences_of_cosines(shards: Path, tmp_path: Path) -> None:
    report = score_shards(Colours(), shards, tmp_path / "out", batch_size=2, progress=False)
    assert report.pairs == 5 and report.negatives == {"replace": 3} and report.hard["replace"] == 0
    blue, pink = sheets(tmp_path / "out")[0]["negatives"][0]
    assert blue["score"] == pytest.approx(-1, abs=0.02) and blue["text"] == "a blue square"
    cosine = 255 / (255**2 + 2 * 80**2) ** 0.5
    assert pink["score"] == pytest.approx(cosine - 1, abs=0.02)
    assert Index.load(tmp_path / "out").read(0)["jpg"] == Index.load(shards).read(0)["jpg"]

    data = DataConfig(negatives=1, negative_policy="hardest", augment="none")
    reader = Reader(Index.load(tmp_path / "out"), [range(5)], data, Preprocess(16), 0, None)
    assert [n["text"] for n in reader.row(0, 0).negatives] == ["a pink square"]
    with pytest.raises(UserError, match="is there already"):
        score_shards(Colours(), shards, tmp_path / "out", progress=False)


def test_embeddings_of_what_has_not_changed_stay(shards: Path, tmp_path: Path) -> None:
    rows = {"m.text.npy": b"texts", "m.negatives.npy": b"negatives", "m.image.npy": b"image"}
    pairs = [
        replace(pair("a", "red", ["blue"]), negative_images=rows),
        replace(pair("b", "blue", ["red"]), negative_images=rows),
    ]
    write_shard(pairs, tmp_path / "x.tar")
    score_shards(Colours(), tmp_path / "x.tar", tmp_path / "scored", progress=False)
    mine(Colours(), tmp_path / "scored", tmp_path / "mined", progress=False)
    add_nouns(tmp_path / "mined", tmp_path / "nouns", workers=1, progress=False)
    (tmp_path / "t.jsonl").write_text(json.dumps({"key": "a", "text": "a new square", "picture": "p.png"}))
    png(tmp_path / "p.png", "red")
    attach(tmp_path / "nouns", tmp_path / "t.jsonl", tmp_path / "pictured")
    make(tmp_path / "nouns", tmp_path / "made", kinds=["replace_adjectives"], workers=1, progress=False)
    for folder in ("scored", "mined", "nouns"):
        assert stored(tmp_path / folder) == [set(rows)] * 2
    assert stored(tmp_path / "pictured") == [rows.keys() - {"m.negatives.npy"}, set(rows)]
    assert stored(tmp_path / "made") == [rows.keys() - {"m.negatives.npy"}] * 2


def stored(folder: Path) -> list[set[str]]:
    """The members of each pair that are embeddings."""
    index = Index.load(folder)
    return [{suffix for suffix in index.read(id) if suffix.endswith(".npy")} for id in range(len(index))]


def embedded(image: list[list[float]], text: list[list[float]], groups: Sequence[int] = ()) -> Embedded:
    tables = [np.array(x, np.float32) / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
    n = len(image)
    return Embedded(tables[0], tables[1], list("abcdefgh"[:n]), np.array(groups or range(n)))


def test_neighbours_by_loop() -> None:
    rng = np.random.default_rng(0)
    found = embedded(rng.normal(size=(30, 5)).tolist(), rng.normal(size=(30, 5)).tolist(), [i // 2 for i in range(30)])
    for by, queries in (("image", found.image), ("text", found.text)):
        for at_most in (0.0, 0.9):
            rows, _ = neighbours(found, 4, by, at_most)  # type: ignore[arg-type]
            for i, row in enumerate(rows):
                own = float(found.text[i] @ found.image[i])
                allowed = [
                    j for j in range(30)
                    if i // 2 != j // 2 and (not at_most or float(found.text[i] @ found.image[j]) <= at_most * own)
                ]  # fmt: skip
                wanted = sorted(allowed, key=lambda j: -float(queries[i] @ found.image[j]))[:4]
                assert row == wanted


def test_what_fits_the_caption_too_well_is_left_out() -> None:
    # Picture b says what caption a says as well as a's own; c is near and false.
    found = embedded([[1, 0], [1, 0.01], [1, 0.6]], [[1, 0.0], [0.9, 0.1], [0, 1]])
    assert neighbours(found, 1)[0][0] == [1]
    rows, left_out = neighbours(found, 1, "image", 0.95)
    assert rows[0] == [2] and left_out >= 1


def test_mined_pairs_are_alternates(shards: Path, tmp_path: Path) -> None:
    report = mine(Colours(), shards, tmp_path / "out", count=2, progress=False)
    assert (report.pairs, report.covered) == (5, 5)
    named = {key: sheet["alternates"] for key, sheet in zip("abcde", sheets(tmp_path / "out"))}
    assert set(named["a"]) == {"d", "e"} and "e" not in named["d"] and named["d"][0] == "a"  # e shows d's picture
    data = DataConfig(alternates=True, augment="none")
    reader = Reader(Index.load(tmp_path / "out"), [range(5)], data, Preprocess(16), 0, None)
    assert [len(reader.rows(range(5), [0] * 5, []))] == [10]
    # Everything fits too well: the nearest is named all the same, as every pair must name one.
    strict = mine(Colours(), shards, tmp_path / "strict", count=1, at_most=1e-6, progress=False)
    assert strict.covered < 5 and all(sheet["alternates"] for sheet in sheets(tmp_path / "strict"))
    assert len(embed_pairs(Colours(), Index.load(shards), 3, False).keys) == 5
    write_shard([pair("x", "red")], tmp_path / "one.tar")
    with pytest.raises(UserError, match="one picture"):
        mine(Colours(), tmp_path / "one.tar", tmp_path / "o", progress=False)


def png(path: Path, colour: str, kind: str = "PNG") -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), colour).save(buffer, kind)
    path.write_bytes(buffer.getvalue())


def test_pictures_of_negatives_come_and_go_round(shards: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.jsonl"
    assert wishes(shards, wanted) == 3 and wishes(shards, tmp_path / "none.jsonl", ["swap"]) == 0
    rows = [json.loads(line) for line in wanted.read_text().splitlines()]
    assert rows[0] == {
        "key": "a", "caption": "a red square", "kind": "replace", "text": "a blue square", "picture": "a.0.0.png",
    }  # fmt: skip
    for row in rows:
        png(tmp_path / row["picture"], row["text"].split()[1])
    rows.append({"key": "c", "text": "a square in snow", "picture": "snow.bmp", "kind": "scenery"})
    png(tmp_path / "snow.bmp", "white", "BMP")
    wanted.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = attach(shards, wanted, tmp_path / "out")
    assert (report.shards, report.known, report.new) == (2, 3, 1)

    index = Index.load(tmp_path / "out")
    data = DataConfig(negatives=2, negative_images=2, augment="none")
    reader = Reader(index, [range(5)], data, Preprocess(8), 0, None)
    row = reader.row(0, 0)
    for negative, picture in zip(row.negatives, row.negative_pictures):
        assert picture is not None
        colour = COLOURS[negative["text"].split()[1]] if "blue" in negative["text"] else (255, 192, 203)
        assert abs(picture[:, 4, 4].float() - torch.tensor(colour)).max() < 3
    assert sheets(tmp_path / "out")[2]["negatives"][0] == [
        {"text": "a square in snow", "kind": "scenery", "source": "generated", "picture": 0}
    ]
    assert "negative0.jpg" in index.read(2)  # a format that shards do not hold was converted
    again = attach(tmp_path / "out", wanted, tmp_path / "again")
    assert (again.known, again.new) == (0, 0) and sheets(tmp_path / "again") == sheets(tmp_path / "out")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"key": "zzz", "text": "t", "picture": "p.png"}, "zzz: no pair of the shards"),
        ({"key": "a", "text": "t"}, "needs key, text and picture; without picture"),
        ({"key": "a", "text": "t", "picture": "gone.png"}, "gone.png: No such file"),
        ({"key": "a", "text": "t", "picture": "table.jsonl"}, "table.jsonl"),
        ({"key": "a", "text": " ", "picture": "p.png"}, "line 1: the text is blank"),
        ({"key": "a", "text": "a red square ", "picture": "p.png"}, "line 1: 'a red square ' is a caption of a"),
        ({"key": "a", "text": "t", "caption": "what", "picture": "p.png"}, "has no caption 'what'"),
    ],
)
def test_rows_that_fit_nothing(shards: Path, tmp_path: Path, row: dict[str, str], message: str) -> None:
    png(tmp_path / "p.png", "red")
    table = tmp_path / "table.jsonl"
    table.write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        attach(shards, table, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar")) if (tmp_path / "out").exists() else True


def test_keys_of_two_shards_are_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.negatives.mining.embed_pairs", lambda *_: pytest.fail("worked"))
    write_shard([pair("a", "green", ["blue"])], tmp_path / "in" / "z.tar")
    (tmp_path / "t.jsonl").write_text(json.dumps({"key": "a", "text": "t", "picture": "p.png"}))
    for call in (
        lambda: wishes(shards, tmp_path / "w.jsonl"),
        lambda: mine(Colours(), shards, tmp_path / "out", progress=False),
        lambda: attach(shards, tmp_path / "t.jsonl", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"z\.tar/a: another shard has this key too"):
            call()
    assert not (tmp_path / "out").exists() and not (tmp_path / "w.jsonl").exists()


def test_blank_negatives_are_not_to_be_drawn(tmp_path: Path) -> None:
    sample = pair("a", "red", ["blue", "green"])
    sample.extra["negatives"][0][0]["text"] = " "
    write_shard([sample], tmp_path / "x.tar")
    assert wishes(tmp_path / "x.tar", tmp_path / "w.jsonl") == 1


def test_commands(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.model.load.load", lambda name: Colours())
    assert "replace" in well("negatives", "score", "m", shards, "--out", tmp_path / "scored")
    assert "5 of 5 pairs" in well("negatives", "mine", "m", shards, "--out", tmp_path / "mined", "--by", "text")
    assert "3 negatives without a picture" in well("negatives", "pictures", shards, "--list", tmp_path / "w.jsonl")
    assert "either --list FILE" in wrong("negatives", "pictures", shards)
    table = ["negatives", "pictures", shards, "--table", tmp_path / "w.jsonl", "--out", tmp_path / "o"]
    assert "--kinds: belongs to --list FILE" in wrong(*table, "--kinds", "replace")
    assert "--overwrite: belongs to --out DIR" in wrong(*table[:3], "--list", tmp_path / "w.jsonl", "--overwrite")
    assert "either --list FILE" in wrong("negatives", "pictures", shards, "--table", tmp_path / "w.jsonl")
