"""Abstract Scenes: parsing, painting, cleaning, captions, and that the scenes of the tests are not trained on."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from clipkit.data.abstract_scenes import AbstractScenes, abstract_scenes, captions_of, clean, paint_order, parse
from clipkit.data.files import Files
from clipkit.errors import UserError
from tests.scenes import BACKGROUND, BALL_UNUSED, BOY, CLOUD, COLOURS, SUN, TREE_FAR, write_scenes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes.tar")


def test_parse_reads_pieces_and_leaves_out_unused_ones():
    boy, tree = parse(",".join(["3", BOY, BALL_UNUSED, TREE_FAR]) + ",")
    assert (boy.png, boy.category, boy.x, boy.y, boy.z, boy.flip) == ("hb0_0s.png", 2, 250, 200, 0, False)
    assert tree.z == 2


def test_parse_names_a_count_that_does_not_fit():
    with pytest.raises(UserError, match="2 pieces need 16 fields, found 8"):
        parse(f"2,{BOY}")


def test_paint_order_is_sun_sky_far_near():
    pieces = parse(",".join(["4", BOY, CLOUD, TREE_FAR, SUN]))
    assert [piece.png for piece in paint_order(pieces)] == ["s_3s.png", "s_1s.png", "p_0s.png", "hb0_0s.png"]


def test_render_scales_by_depth_and_covers_what_is_behind(path: Path):
    picture = AbstractScenes(Files(path)).render(0, 400)  # the canvas is 500 x 400: x is squashed by 0.8

    def colour(x: int, y: int) -> tuple[int, ...]:
        found = picture.getpixel((round(x * 0.8), y))
        assert isinstance(found, tuple)
        return found

    def named(name: str) -> tuple[int, ...]:
        return ImageColor.getrgb(name)

    assert colour(100, 50) == named(COLOURS["s_1s.png"])  # the cloud before the sun ...
    assert colour(100 + 40, 50) == named(COLOURS["s_3s.png"])  # ... but smaller: 0.7 of 100 pixels
    assert colour(250, 200) == named(COLOURS["hb0_0s.png"])  # the near boy hides the far tree
    assert colour(10, 390) == named(BACKGROUND)


def test_flip_mirrors_left_and_right(tmp_path: Path, path: Path):
    data = AbstractScenes(Files(path))
    half = Image.new("RGBA", (100, 60), "red")
    half.paste((0, 0, 255, 255), (0, 0, 50, 60))
    data._open = lambda png: half if png == "t_0s.png" else Image.new("RGBA", (500, 400), "gray")  # type: ignore[method-assign]
    for flip in (0, 1):
        data.records[0]["scene"] = f"1,t_0s.png,0,0,7,250,200,0,{flip}"
        red, _, blue = np.asarray(data.render(0, 400))[200, round(230 * 0.8)]
        assert (blue > red) == (flip == 0)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Hi", ""),
        ("can i check ?", ""),
        ("move the tree a bit up", ""),
        ("ok make jenny smaller thanks", ""),
        ("The Boy wears a `pirate' hat .", "the boy wears a 'pirate' hat"),
        ("the cat is in the corner . why do n't i check .", "the cat is in the corner"),
        ("jenny holds the ball , then i 'll peek", "jenny holds the ball"),
        ("a small tree with a hole . ready ?", "a small tree with a hole"),
    ],
)
def test_clean_keeps_what_is_said_of_the_scene(message: str, said: str):
    assert clean(message) == said


def test_captions_are_runs_of_consecutive_messages():
    messages = ["one one", "two two", "three three", "four four"]
    captions = captions_of(messages, 8, 6, random.Random(0))
    assert len(captions) == len(set(captions)) <= 8
    whole = " . ".join(messages)
    assert all(caption in whole and caption.count(" . ") <= 2 for caption in captions)
    assert all(len(caption.split()) <= 6 for caption in captions)
    assert all(any(message in caption for caption in captions) for message in messages)


def test_captions_leave_out_a_message_that_is_too_long():
    assert captions_of(["a b c d e f", "g h"], 4, 3, random.Random(0)) == ["g h"]


def test_source_yields_pictures_and_captions_of_its_split(path: Path):
    samples = list(abstract_scenes(path, size=32))
    assert [sample.key for sample in samples] == ["00000", "00001"]
    assert Image.open(io.BytesIO(samples[0].image)).size == (32, 32)
    said = ["a boy is in front of the tree", "the sun is on the left side"]
    assert set(samples[0].captions) <= {*said, " . ".join(said)}
    assert samples[0].extra["scene"]["pieces"][0]["png"] == "s_1s.png"


@pytest.mark.parametrize(("split", "keys"), [("train", ["00000", "00001"]), ("val", ["00002"]), ("test", ["00005"])])
def test_scenes_of_minimal_pairs_are_kept_for_testing(path: Path, split, keys: list[str]):
    assert [sample.key for sample in abstract_scenes(path, split=split)] == keys


def test_source_is_a_function_of_its_settings(path: Path):
    assert list(abstract_scenes(path)) == list(abstract_scenes(path))


def test_another_tar_is_a_user_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"scenes\.jsonl\.gz is not in it"):
        next(abstract_scenes(tmp_path))


def test_shared_scenes_hold_out_every_scene_of_a_minimal_pair(shared: Path):
    data = AbstractScenes(Files(shared / "data" / "codraw_scenes.tar"))
    named = {int(row["img_id"]) for table in data.minimal_pairs.values() for row in table}
    assert len(named) == 534 and named <= data.held_out and named <= data.records.keys()
    first = next(abstract_scenes(shared / "data" / "codraw_scenes.tar", split="val", size=16))
    assert int(first.key) not in data.held_out
