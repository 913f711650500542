"""Benchmarks whose annotations are not at hand: their published form in small, constant, random and oracle."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Benchmark, Row
from clipkit.evaluation.convert import convert
from clipkit.evaluation.table import Table
from tests.evaluation.fakes import Constant, Random
from tests.evaluation.test_published import Named, knows, rows_of, task_of, write_json


def mmvp_vlm(folder: Path, pairs: int = 135) -> Path:
    lines = [["Question ID", "Type", "Statement"]]
    for n in range(pairs):
        lines += [
            [f"{2 * n + 1}", f"Kind {n // 15}", f"left {n}, yes"],
            [f"{2 * n + 2}", f"Kind {n // 15}", f"right {n}"],
        ]
    return write_csv(folder / "Questions.csv", lines)


def write_csv(path: Path, lines: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


EQBEN = ("ag", "youcook2", "gebc", "kubric_loc", "kubric_attr", "kubric_cnt", "sd")


def eqben(folder: Path, per_subset: int = 20) -> Path:
    info, quarters = [], []
    for number, (subset, n) in enumerate(itertools.product(EQBEN, range(per_subset))):
        for c, i in itertools.product((0, 1), (0, 1)):
            info.append({"dataset": f"eqben{subset}", "name": f"c{c}i{i}", "sample_cnt": number})
            picture = f"eqben{subset}/{n}_{i}.{'npy' if subset == 'youcook2' else 'jpg'}"
            quarters.append({"image": picture, "caption": f"{subset} {n} {c}"})
    # The authors recover the order of info by argsort(private_random_idx).
    order = np.random.default_rng(0).permutation(len(info))
    write_json(folder / "private_info.json", info)
    write_json(folder / "private_random_idx.json", order.tolist())
    write_json(folder / "ann_json_finegrained_random.json", [quarters[n] for n in order])
    return folder


def crepe(folder: Path, rows: int = 12) -> Path:
    for kind, n in itertools.product(("atom", "swap", "negate"), (4, 5)):
        lines = [["image_id", "caption", "hard_negs", "x", "y", "width", "height"]]
        for r in range(rows):
            wrong = [f"{kind} {n} {r} isn't {k}" for k in range(5)]
            lines.append([f"{r}", f"{kind} {n} {r}, right", repr(wrong), "3", "4", "20", "10"])
        write_csv(folder / kind / f"prod_vg_hard_negs_{kind}_complexity_{n}.csv", lines)
    return folder


def vl_checklist(folder: Path, rows: int = 40) -> Path:
    for name in ("Attribute/vg/size", "Object/Location/hake_location/hake_obj_mid", "Relation/swig/action"):
        items = [[f"part/{n}.jpg", {"POS": [f"{name} {n}", "x"], "NEG": [f"{name} not {n}", "y"]}] for n in range(rows)]
        (folder / "data" / name).parent.mkdir(parents=True)
        write_json(folder / "data" / f"{name}.json", items)
    (folder / "data/Relation/empty.json").write_bytes(b"")
    write_json(folder / "corpus.json", {"not": "rows"})
    return folder


def inpaint_coco(folder: Path, rows: int = 60) -> Path:
    items = [
        {"concept": ("object", "color", "size")[n % 3], "coco_caption": f"a {n}", "inpaint_caption": f"b {n}"}
        for n in range(rows)
    ]
    (folder / "inpaint_coco.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def vg_relation(folder: Path, rows: int = 60) -> Path:
    items = [box(n) | {"relation_name": ("on", "near", "under")[n % 3]} for n in range(rows)]
    return write_json(folder / "visual_genome_relation.json", items)


def vg_attribution(folder: Path, rows: int = 60) -> Path:
    items = [box(n) | {"attributes": [("red", "big")[n % 2], "small"]} for n in range(rows)]
    return write_json(folder / "visual_genome_attribution.json", items)


def box(n: int) -> dict[str, Any]:
    place = {"bbox_x": 5, "bbox_y": 0, "bbox_w": 40, "bbox_h": 20, "image_path": f"{n}.jpg"}
    return place | {"true_caption": f"{n} on b", "false_caption": f"b on {n}"}


def flickr30k_order(folder: Path) -> Path:
    of = itertools.product(
        ("black", "young", "tall", "wet"), ("dog", "man", "horse", "boy"), ("grass", "sand", "street")
    )
    items = [
        {
            "image": f"flickr30k-images/{n}.jpg",
            "caption": [f"Two {a} cats and one old {b} run over the green {c} today ."],
        }
        for n, (a, b, c) in enumerate(of)
    ]
    return write_json(folder / "flickr30k_test.json", items)


def winoground(folder: Path, rows: int = 400) -> Path:
    items = [
        {"id": n, "image_0": f"{n}_0", "image_1": f"{n}_1", "caption_0": f"{n} a", "caption_1": f"{n} b"}
        for n in range(rows)
    ]
    lines = [json.dumps(item | {"collapsed_tag": "Object"}) + "\n" for item in items]
    (folder / "examples.jsonl").write_text("".join(lines))
    return folder / "examples.jsonl"


def whatsup(folder: Path, objects: int = 12) -> Path:
    places = ("on", "under", "left_of", "right_of")
    for kind in ("images", "clevr"):
        items = []
        for n, place in itertools.product(range(objects), places):
            options = [f"{kind} {n} {other}" for other in (place, *(p for p in places if p != place))]
            items.append({"image_path": f"data/controlled_{kind}/{n}_{place}_b.jpeg", "caption_options": options})
        write_json(folder / f"controlled_{kind}_dataset.json", items)
    for photos, count in itertools.product(("coco", "vg"), ("one", "two")):
        said = f"{photos} {count}"
        rows = [[100 * len(said) + n, f"{said} {n} left", f"{said} {n} right"] for n in range(48)]
        write_json(folder / f"{photos}_qa_{count}_obj.json", rows)
    return folder


def svo_probes(folder: Path, rows: int = 90) -> Path:
    lines = [["sentence", "pos_image_id", "neg_image_id", "subj_neg", "verb_neg", "obj_neg"]]
    for n in range(rows):
        lines.append([f"A dog, {n}", f"{2 * n}", f"{2 * n + 1}", *(str(n % 3 == place) for place in range(3))])
    return write_csv(folder / "svo_probes.csv", lines)


CHANCE = {
    mmvp_vlm: 1 / 4, eqben: 1 / 6, crepe: 1 / 6, vl_checklist: 1 / 2, inpaint_coco: 1 / 6, vg_relation: 1 / 2,
    vg_attribution: 1 / 2, flickr30k_order: 1 / 5, winoground: 1 / 6, whatsup: (2 / 4 + 4 / 2) / 6, svo_probes: 1 / 2,
}  # fmt: skip
WRITE: dict[str, Callable[[Path], Path]] = {write.__name__: write for write in CHANCE}


@pytest.mark.parametrize("name", WRITE)
def test_constant_random_and_oracle(tmp_path: Path, name: str):
    (tmp_path / "source").mkdir()
    convert(name, WRITE[name](tmp_path / "source"), tmp_path)
    task = task_of(name, tmp_path)
    assert {p.src for p in task.pictures} <= task.benchmark.sources.keys()
    constant = task.score(Named(Constant()), "strict")  # type: ignore[arg-type]
    assert {metric.value for metric in constant.metrics.values()} == {0.0}
    scores = [task.score(Named(Random(seed)), "official").score for seed in range(6)]  # type: ignore[arg-type]
    chance = CHANCE[WRITE[name]]
    assert scores[0].chance == pytest.approx(chance)
    slack = 0.8 * (scores[0].high - scores[0].low) / len(scores) ** 0.5
    assert np.mean([score.value for score in scores]) == pytest.approx(chance, abs=slack)
    right = task.score(Named(knows(task)), "strict")  # type: ignore[arg-type]
    assert {metric.value for metric in right.metrics.values()} == {1.0}


def test_mmvp_has_nine_patterns_of_fifteen_pairs(tmp_path: Path):
    convert("mmvp_vlm", mmvp_vlm(tmp_path), tmp_path)
    rows = rows_of("mmvp_vlm", tmp_path)
    assert [row["category"] for row in rows[::15]] == [
        "orientation", "specific_features", "state", "quantity", "position", "colour", "structure", "text", "viewpoint",
    ]  # fmt: skip
    assert [image["path"] for image in rows[16]["images"]] == ["Kind 1/33.jpg", "Kind 1/34.jpg"]
    assert rows[0]["texts"] == ["left 0, yes", "right 0"]
    assert task_of("mmvp_vlm", tmp_path).rows[0].texts[0] == "a photo of left 0, yes"
    with pytest.raises(UserError, match="at most 135, found 272 lines"):
        convert("mmvp_vlm", mmvp_vlm(tmp_path, 136), tmp_path)
    other = write_csv(tmp_path / "Questions.csv", [["a", "b", "c"], ["2", "x", "one"], ["3", "x", "other"]])
    with pytest.raises(UserError, match="pair 1 should be an odd and an even number, is 2, 3"):
        convert("mmvp_vlm", other, tmp_path)


def test_eqben_is_put_in_order_again(tmp_path: Path):
    convert("eqben", eqben(tmp_path, 2), tmp_path)
    rows = rows_of("eqben", tmp_path)
    assert [row["category"] for row in rows[::2]] == list(EQBEN)
    assert rows[3]["texts"] == ["youcook2 1 0", "youcook2 1 1"]
    assert [image["path"] for image in rows[3]["images"]] == ["eqbenyoucook2/1_0.png", "eqbenyoucook2/1_1.png"]
    write_json(tmp_path / "private_random_idx.json", [0])
    with pytest.raises(UserError, match="equally long, found 56, 1, 56"):
        convert("eqben", tmp_path, tmp_path)


def test_crepe_reads_lists_and_crops(tmp_path: Path):
    convert("crepe", crepe(tmp_path, 1), tmp_path)
    rows = {row["category"]: row for row in rows_of("crepe", tmp_path)}
    assert rows.keys() == {"atom_4", "atom_5", "swap_4", "swap_5", "negate_4", "negate_5"}
    assert rows["negate_5"]["texts"][:2] == ["negate 5 0, right", "negate 5 0 isn't 0"]
    assert rows["atom_4"]["images"] == [{"src": "visual_genome", "path": "0.jpg", "bbox": [3, 4, 20, 10]}]


def test_vl_checklist_takes_the_first_rows_of_every_file(tmp_path: Path):
    found = convert("vl_checklist", vl_checklist(tmp_path), tmp_path, first=30)
    assert found["n"] == 90 and found["dropped"] == {"beyond the first 30 of a file": 30}
    first = {row["meta"]["section"]: row for row in reversed(rows_of("vl_checklist", tmp_path))}
    assert {name: (row["images"][0]["src"], row["images"][0]["path"]) for name, row in first.items()} == {
        "attribute": ("visual_genome", "0.jpg"),
        "object": ("hake", "part/0.jpg"),
        "relation": ("swig", "0.jpg"),
    }
    assert convert("vl_checklist", tmp_path, tmp_path, first=0)["n"] == 120


def test_whatsup_pairs_and_sets(tmp_path: Path):
    """As the official script counts them: both of two opposite places, all four, of the same two objects."""
    places = ("left_of", "right_of", "on", "under")
    files = [f"data/controlled_images/{a}_{p}_{b}.jpeg" for a, b in (("mug", "plate"), ("cap", "box")) for p in places]
    items = [{"image_path": file, "caption_options": [f"{file} {k}" for k in range(4)]} for file in files]
    write_json(tmp_path / "controlled_images_dataset.json", items)
    write_json(tmp_path / "controlled_clevr_dataset.json", [])
    for photos, count in itertools.product(("coco", "vg"), ("one", "two")):
        write_json(tmp_path / f"{photos}_qa_{count}_obj.json", [[42, "on the left", "on the right"]])
    convert("whatsup", tmp_path, tmp_path)
    task = task_of("whatsup", tmp_path)
    credit = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1], dtype=float)
    metrics = Table(task.benchmark, task.rows, task.categories).metrics({"i2t": credit})
    assert (metrics["i2t/pairs_a"].value, metrics["i2t/pairs_a"].n) == (3 / 4, 4)
    assert (metrics["i2t/sets_a"].value, metrics["i2t/sets_a"].n) == (1 / 2, 2)
    assert metrics["i2t/pairs_a"].chance == pytest.approx(1 / 16) and metrics["i2t/sets_a"].chance == pytest.approx(
        1 / 256
    )
    assert "i2t/sets_b" not in metrics


def test_together_leaves_out_what_is_not_whole():
    fields = {"images": [{"path": "a"}], "texts": ["x", "y"], "match": [[1, 0]]}
    rows = [Row.model_validate(fields | {"id": str(n), "cluster": str(n), "group": "aab"[n]}) for n in range(3)]
    about = {"name": "b", "kind": "compositional", "version": "1", "title": "b", "rows": ["x"]}
    benchmark = Benchmark.model_validate(about | {"aggregates": {"whole": {"together": "group"}}})
    metric = Table(benchmark, rows, {"all"}).metrics({"i2t": np.array([1.0, 0.5, 0.0])})["i2t/whole"]
    assert (metric.value, metric.n) == (0.5, 1)
