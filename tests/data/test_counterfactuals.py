"""Children exchanged: what the other picture shows, and captions that are true of it alone."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from clipkit.data import counterfactuals as exact
from clipkit.data.abstract_scenes import Piece, abstract_scenes
from clipkit.data.build import write_shards
from clipkit.data.counterfactuals import Counterfactual, children, counterfactuals, exchanged, named, said_of
from clipkit.data.decode import Preprocess
from clipkit.data.reader import Reader
from clipkit.data.shards import Index
from clipkit.settings import DataConfig
from tests import scenes


def piece(png: str, x: float = 100) -> Piece:
    return Piece(png, 2, x, 200, 0, False)


# An angry boy who sits (legs crossed: pose 4, face 0) and a sad girl who runs (pose 3, face 3).
SCENE = [piece("p_0s.png"), piece("hb1_18s.png", 300), piece("hb0_20s.png")]


def of_kind(kind: str) -> Counterfactual:
    return next(other for other in counterfactuals(SCENE) if other.kind == kind)


def test_children_are_read_off_their_files() -> None:
    boy, girl = children(SCENE)
    assert (boy.at, boy.mood, boy.does, girl.at, girl.mood, girl.does) == (2, "angry", "sitting", 1, "sad", "running")
    assert [child.png for child in (boy, girl)] == ["hb0_20s.png", "hb1_18s.png"]


def test_exchanges_touch_nothing_else() -> None:
    found = {other.kind: [p.png for p in other.pieces] for other in counterfactuals(SCENE)}
    assert found == {
        "roles": ["p_0s.png", "hb0_18s.png", "hb1_20s.png"],
        "moods": ["p_0s.png", "hb1_15s.png", "hb0_23s.png"],
        "poses": ["p_0s.png", "hb1_23s.png", "hb0_15s.png"],
    }
    for other in counterfactuals(SCENE):
        assert [(p.x, p.y, p.z, p.flip) for p in other.pieces] == [(p.x, p.y, p.z, p.flip) for p in SCENE]
    assert counterfactuals(SCENE[:2]) == []
    alike = [piece("hb0_20s.png"), piece("hb1_25s.png")]  # both angry, both sitting
    assert [other.kind for other in counterfactuals(alike)] == ["roles"]


@pytest.mark.parametrize(
    "kind, caption, other",
    [
        ("roles", "an angry boy holds his pie , she looks at him", "an angry girl holds her pie , he looks at her"),
        ("roles", "mike is on the left of jenny", "jenny is on the left of mike"),
        ("roles", "a boy with a pie", ""),  # nothing in which they differ is said
        ("roles", "a big sun on the left", ""),
        ("moods", "an angry boy by a tree", "a sad boy by a tree"),
        ("moods", "jenny is crying on the right", "jenny is angry on the right"),
        ("moods", "the boy is happy", ""),  # not what the picture shows
        ("moods", "the boy is angry and the girl is sad", "the girl is angry and the boy is sad"),
        ("moods", "the boy is angry and the girl is sad on the left", ""),
        ("poses", "mike is sitting , angry", "mike is running , angry"),
        ("poses", "mike is sitting and sitting", ""),
        ("poses", "a girl in red", ""),
    ],
)
def test_what_is_said_of_the_other_picture(kind: str, caption: str, other: str) -> None:
    assert said_of(caption, of_kind(kind)) == other


def test_exchanged_twice_is_the_caption() -> None:
    assert exchanged("the girl 's hat touches her head and covers her .") == (
        "the boy 's hat touches his head and covers him ."
    )
    for caption in ("he gives the girl his ball and sits by jenny", "two boys", "a dog"):
        assert exchanged(exchanged(caption)) == caption


def test_statements_are_true_and_names_are_a_share() -> None:
    texts = {text for seed in range(40) for text in exact.statements(SCENE, Random(seed))}
    assert "mike is sitting" in texts and "the girl is running" in texts and "jenny is crying" in texts
    assert "mike is angry and jenny is sad" in texts and "the girl is running and mike is sitting" in texts
    assert not [t for t in texts if "jenny is angry" in t or "boy is sad" in t or t == "mike is running"]
    caption = "a boy looks at the girl , the boy 's hat"
    assert named(caption, 0.0, Random(0)) == caption
    assert named(caption, 1.0, Random(0)) == "mike looks at jenny , mike 's hat"
    assert 20 < sum(named(caption, 0.3, Random(seed)) != caption for seed in range(100)) < 40


def test_shards_hold_the_other_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    girl = "hb1_18s.png,0,0,2,100,200,0,0"
    boy = "hb0_20s.png,0,0,2,400,200,0,0"
    colours = {f"hb{sex}_{number}s.png": colour for sex, number, colour in (
        (0, 20, "blue"), (1, 18, "red"), (0, 18, "navy"), (1, 20, "maroon"), (1, 15, "tan"), (0, 23, "teal"),
        (1, 23, "plum"), (0, 15, "gold"),
    )}  # fmt: skip
    said = ["the angry boy sits on the right"]
    record = {"split": "train", "scene": f"2,{girl},{boy}", "messages": said, "in_minimal_pairs": False}
    monkeypatch.setattr(scenes, "records", lambda: [record | {"image_id": n} for n in range(6)])
    monkeypatch.setattr(scenes, "COLOURS", colours)
    path = scenes.write_scenes(tmp_path / "scenes.tar")
    samples = list(abstract_scenes(path, counterfactuals=True, statements=2, size=100))
    write_shards(samples, tmp_path / "out", progress=False)
    one = samples[0]
    assert one.extra["caption_kinds"] == ["message"] * (len(one.captions) - 2) + ["statement"] * 2
    at = one.captions.index("the angry boy sits on the right")
    assert {n["kind"]: n["text"] for n in one.extra["negatives"][at]} == {
        "exchange_roles": "the angry girl sits on the right",
        "exchange_moods": "the sad boy sits on the right",
    }

    def colour(data: bytes, x: int) -> tuple[int, ...]:
        found = Image.open(io.BytesIO(data)).convert("RGB").getpixel((x, 50))
        assert isinstance(found, tuple)
        return found

    def near(found: tuple[int, ...], name: str) -> bool:
        from PIL import ImageColor

        return max(abs(a - b) for a, b in zip(found, ImageColor.getrgb(name))) < 12

    assert near(colour(one.image, 20), "red") and near(colour(one.image, 80), "blue")
    exchanged_whole = one.negative_images["negative0.jpg"]
    assert near(colour(exchanged_whole, 20), "navy") and near(colour(exchanged_whole, 80), "maroon")

    data = DataConfig(negatives=2, negative_images=2, augment="none", caption_kinds={"statement": 1})
    reader = Reader(Index.load(tmp_path / "out"), [range(2)], data, Preprocess(16), 0, None)
    row = reader.row(0, 0)
    assert row.negatives and all(picture is not None for picture in row.negative_pictures)
