"""Converters: published annotations into rows that the benchmark files describe, byte for byte the same each time."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Benchmark, load, read_rows
from clipkit.evaluation.convert import CONVERTERS, convert, perturb
from clipkit.evaluation.roots import Roots
from tests.scenes import write_scenes, write_tar

SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def rows_of(name: str, out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def accepted(name: str, out: Path) -> int:
    """How many rows the evaluation reads."""
    benchmark = Benchmark(name=name, kind="compositional", version="1", title=name, rows=[f"bench:{name}.jsonl"])
    return len(read_rows(benchmark, Roots({"bench": out})))


def test_sugarcrepe(tmp_path: Path):
    item = {"filename": "000000000001.jpg", "caption": "a cat", "negative_caption": "a dog"}
    tar = write_tar(tmp_path / "s.tar", {f"{kind}.json": json.dumps({"7": item}).encode() for kind in SUGARCREPE})
    found = convert("sugarcrepe", tar, tmp_path)
    assert found["by_category"] == dict.fromkeys(SUGARCREPE, 1)
    assert rows_of("sugarcrepe", tmp_path)[0] == {
        "id": "add_att/7",
        "category": "add_att",
        "cluster": "000000000001.jpg",
        "images": [{"src": "coco_val2017", "path": "000000000001.jpg"}],
        "texts": ["a cat", "a dog"],
        "match": [[1, 0]],
    }
    assert accepted("sugarcrepe", tmp_path) == 7


def test_sugarcrepe_names_the_missing_file(tmp_path: Path):
    tar = write_tar(tmp_path / "s.tar", {"other.json": b"{}"})
    with pytest.raises(UserError, match=r"one file add_att\.json, found none"):
        convert("sugarcrepe", tar, tmp_path)


def test_vsr_rows_are_true_or_false(tmp_path: Path):
    items = [{"image": "1.jpg", "caption": "left", "label": label, "relation": "left of"} for label in (0, 1)]
    (tmp_path / "vsr_rows.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    convert("vsr", tmp_path / "vsr_rows.jsonl", tmp_path)
    assert [row["match"] for row in rows_of("vsr", tmp_path)] == [[[0]], [[1]]]
    assert accepted("vsr", tmp_path) == 2


def test_valse_keeps_rows_with_a_picture_and_marks_the_valid(tmp_path: Path):
    def item(image: str, votes: int) -> dict:
        return {"image_file": image, "caption": "one cat", "foil": "cats", "mturk": {"caption": votes}}

    items = {"a": item("000000000001.jpg", 3), "b": item("COCO_val2014_000000000001.jpg", 1), "c": item("x.jpg", 3)}
    tar = write_tar(tmp_path / "v.tar", {"valse_plurals.json": json.dumps(items).encode()})
    pictures = write_tar(tmp_path / "coco.tar", {"000000000001.jpg": b""})
    found = convert("valse", tar, tmp_path, pictures=str(pictures))
    rows = rows_of("valse", tmp_path)
    assert [(row["id"], row["valid"]) for row in rows] == [("plurals/a", True), ("plurals/b", False)]
    assert {row["images"][0]["path"] for row in rows} == {"000000000001.jpg"}
    assert found["dropped"] == {"no picture": 1}
    convert("valse", tar, tmp_path)
    sources = [row["images"][0]["src"] for row in rows_of("valse", tmp_path)]
    assert sources == ["coco_val2017", "coco_val2014", "swig"]


def test_abstract_scenes_pairs_are_two_by_two_with_drawn_pictures(tmp_path: Path):
    tar = write_scenes(tmp_path / "scenes.tar")
    assert convert("abstract_scenes_pairs", tar, tmp_path, size=24)["pictures"] == 2
    (row,) = rows_of("abstract_scenes_pairs", tmp_path)
    assert row["texts"] == ["mike runs", "mike sits"] and row["match"] == [[1, 0], [0, 1]]
    assert row["category"] == "verbs"
    with tarfile.open(tmp_path / "abstract_scenes_pairs.tar") as pictures:
        assert pictures.getnames() == [image["path"] for image in row["images"]] == ["3.jpg", "4.jpg"]
        stream = pictures.extractfile("3.jpg")
        assert stream is not None and Image.open(io.BytesIO(stream.read())).size == (24, 24)
    convert("abstract_scenes_choice", tar, tmp_path)
    assert [row["texts"][0] for row in rows_of("abstract_scenes_choice", tmp_path)] == ["mike runs", "mike sits"]
    assert accepted("abstract_scenes_pairs", tmp_path) == 1 and accepted("abstract_scenes_choice", tmp_path) == 2


def test_pairs_that_share_a_scene_are_one_cluster(tmp_path: Path):
    tar = write_scenes(tmp_path / "scenes.tar", pairs=[(0, 1), (2, 3), (1, 4)])
    convert("abstract_scenes_pairs", tar, tmp_path, size=16)
    clusters = [row["cluster"] for row in rows_of("abstract_scenes_pairs", tmp_path)]
    assert clusters[0] == clusters[2] != clusters[1]


def test_minimal_pairs_out_of_step_are_a_user_error(tmp_path: Path):
    tar = write_scenes(tmp_path / "scenes.tar", distractor="mike flies")
    with pytest.raises(UserError, match="verbs: rows 0 and 1 do not mirror"):
        convert("abstract_scenes_pairs", tar, tmp_path)


WORDS = ["the", "red", "cat", "and", "the", "big", "dog", "run", "fast", "now"]
TAGS = ["DT", "JJ", "NN", "CC", "DT", "JJ", "NN", "VB", "RB", "RB"]


def test_perturb_keeps_the_words_and_moves_only_its_own():
    for seed in range(20):
        orders = perturb(WORDS, TAGS, random.Random(seed))
        assert orders is not None
        classes, others, trigrams, within = orders
        assert all(Counter(order) == Counter(WORDS) and order != WORDS for order in orders)
        content = [n for n, tag in enumerate(TAGS) if tag in ("NN", "JJ")]
        assert [classes[n] for n in range(10) if n not in content] == [WORDS[n] for n in range(10) if n not in content]
        assert {classes[2], classes[6]} == {"cat", "dog"} and {classes[1], classes[5]} == {"red", "big"}
        assert [others[n] for n in content] == [WORDS[n] for n in content]
        assert all(" ".join(WORDS[i : i + 3]) in " ".join(trigrams) for i in range(0, 10, 3))
        assert all(Counter(within[i : i + 3]) == Counter(WORDS[i : i + 3]) for i in range(0, 10, 3))


@pytest.mark.parametrize("sentence", ["cat runs", "cat cat", "cat"])
def test_perturb_gives_up_where_an_order_cannot_differ(sentence: str):
    words = sentence.split()
    assert perturb(words, ["NN", "VB"][: len(words)], random.Random(0)) is None


def test_order_texts_are_treated_alike(tmp_path: Path):
    captions = ["Two dogs, one black and one white, run on the grass .", "Yes ."]
    tar = write_tar(tmp_path / "dev.tar", {"a.b.json": json.dumps({"captions": captions}).encode(), "a.b.jpg": b""})
    found = convert("flickr8k_order", tar, tmp_path)
    (row,) = rows_of("flickr8k_order", tmp_path)
    assert row["id"] == "a.b/0" and row["images"][0]["path"] == "a.b.jpg" and row["match"] == [[1, 0, 0, 0, 0]]
    assert row["texts"][0] == "two dogs one black and one white run on the grass"
    assert {tuple(sorted(text.split())) for text in row["texts"]} == {tuple(sorted(row["texts"][0].split()))}
    assert row["texts"].count(row["texts"][0]) == 1
    assert found["dropped"] == {"a shuffle cannot differ": 1}
    assert convert("flickr8k_order", tar, tmp_path)["sha256"] == found["sha256"]
    assert convert("flickr8k_order", tar, tmp_path, seed=1)["sha256"] != found["sha256"]


def test_unknown_names_and_empty_sources_are_user_errors(tmp_path: Path):
    with pytest.raises(UserError, match="no converter called sugarcrep; did you mean sugarcrepe"):
        convert("sugarcrep", tmp_path, tmp_path)
    with pytest.raises(UserError, match="holds no row of vsr"):
        convert("vsr", tmp_path, tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        convert("vsr", tmp_path / "missing", tmp_path)


@pytest.mark.parametrize(
    ("name", "source", "benchmark", "n"),
    [
        ("sugarcrepe", "sugarcrepe_rows.tar", "sugarcrepe_subset", 500),
        ("vsr", "sugarcrepe_rows.tar", "vsr_subset", 21),
        ("valse", "sugarcrepe_rows.tar", "valse_subset", 89),
        ("abstract_scenes_pairs", "codraw_scenes.tar", "abstract_scenes_pairs", 502),
        ("abstract_scenes_choice", "codraw_scenes.tar", "abstract_scenes_choice", 1004),
        ("flickr8k_order", "flickr8k_dev-000.tar", "flickr8k_order", 4887),
    ],
)
def test_shared_rows_are_the_version_their_benchmark_describes(
    shared: Path, tmp_path: Path, name: str, source: str, benchmark: str, n: int
):
    data = shared / "data"
    settings = {"valse": {"pictures": data / "coco_val2017-000.tar"}, "abstract_scenes_pairs": {"size": 16}}
    assert convert(name, data / source, tmp_path, **settings.get(name, {}))["n"] == n
    described = load(benchmark)
    rows = read_rows(described, Roots({"bench": tmp_path}))
    assert len(rows) == n and described.sha256
    assert {picture.src for row in rows for picture in row.pictures} <= described.sources.keys()


def test_every_converter_was_tried_here_or_with_the_published_ones():
    assert CONVERTERS.keys() - {
        "sugarcrepe", "vsr", "valse", "abstract_scenes_pairs", "abstract_scenes_choice", "flickr8k_order",
    } == {
        "sugarcrepe_pp", "vsr_zeroshot", "vsr_random", "bivlc", "cola", "colorswap", "winoground", "nlvr", "nlvr_pairs",
        "coco_order", "flickr30k_order", "vg_relation", "vg_attribution", "whatsup", "svo_probes",
        "mmvp_vlm", "eqben", "crepe", "vl_checklist", "inpaint_coco", "nlvr_orders",
        "cola_gqa", "cola_clevr", "cola_paco",
    }  # fmt: skip
