"""Rows with pictures a model has seen, and rows without."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipkit.errors import UserError
from clipkit.evaluation import leakage
from clipkit.evaluation.benchmark import load, read_rows
from clipkit.evaluation.convert import convert
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.run import evaluate, print_results
from tests.evaluation.fakes import Random, picture, write_benchmark


def test_editions_of_coco_name_one_picture():
    names = ["COCO_val2014_000000391895.jpg", "a/b/000000391895.png", "coco_train2017_000000391895"]
    assert {leakage.plain(name) for name in names} == {"000000391895"}
    assert leakage.plain("Dog_7.JPG") == "dog_7"


def test_every_form_of_a_list(tmp_path: Path):
    (tmp_path / "names.txt").write_text("a.jpg\n\nval2014/COCO_val2014_000000000007.jpg\n")
    assert leakage.read_seen(tmp_path / "names.txt") == {"a", "000000000007"}
    karpathy = [{"image": "val2014/COCO_val2014_000000000007.jpg", "caption": ["a dog"]}]
    for name, tree in (
        ("k", karpathy),
        ("c", {"images": [{"id": 3, "file_name": "x/y.png"}]}),
        ("l", ["z.jpg", "not"]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    assert leakage.read_seen(tmp_path / "k.json") == {"000000000007"}
    assert leakage.read_seen(tmp_path / "c.json") == {"y"} and leakage.read_seen(tmp_path / "l.json") == {"z"}
    with tarfile.open(tmp_path / "train-000.tar", "w") as tar:
        for name in ("k1.jpg", "k1.txt", "k2.png"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert leakage.read_seen(tmp_path / "train-000.tar") == {"k1", "k2"} == leakage.read_seen(f"{tmp_path}/train-*.tar")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "broken.json").write_text("{")
    for name, message in (
        ("none.txt", "names no picture"),
        ("broken.json", "not readable as JSON"),
        ("no", "no such f"),
    ):
        with pytest.raises(UserError, match=message):
            leakage.read_seen(tmp_path / name)


def test_a_compositional_result_is_split(tmp_path: Path, capsys):
    file, _ = write_benchmark(tmp_path / "own", forms={"pair": [[1, 0]], "winoground": [[1, 0], [0, 1]]})
    (tmp_path / "seen.txt").write_text("0.png\n7.png\n")  # of a pair, and one of two pictures of a row
    (result,) = evaluate(Random(), benchmarks=[file], trained_on=tmp_path / "seen.txt", show=False)
    assert result.details["leakage"] == {"seen": 2, "rows": 12}
    split = result.breakdowns["meta.seen"]
    assert (split["yes"]["i2t"].n, split["no"]["i2t"].n) == (2, 10)
    by_id = {item["id"]: item["correct"] for item in result.items}
    seen = [by_id["pair/0"], by_id["winoground/0"]]
    assert split["yes"]["i2t"].value == pytest.approx(np.mean(seen))
    print_results([result])
    assert "2 of 12 rows have seen pictures" in capsys.readouterr().out
    (whole,) = evaluate(Random(), benchmarks=[file], show=False)
    assert whole.metrics == result.metrics and "leakage" not in whole.details


def test_zero_shot_and_retrieval_are_split(tmp_path: Path):
    for number, name in enumerate(("cat", "dog") * 4):
        (tmp_path / "classes" / name).mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "classes" / name / f"{number}.png")
        picture(number).save(tmp_path / "classes" / f"{number}.png")
        (tmp_path / "classes" / f"{number}.json").write_text(json.dumps({"captions": [f"a {number}", f"b {number}"]}))
    about = {"version": "1", "title": "x", "sources": {"s": {"about": "here"}}}
    zeroshot = {"name": "z", "kind": "zeroshot", "images": ["s:"], "classes": ["cat", "dog"], "templates": ["{}"]}
    retrieval = {"name": "r", "kind": "retrieval", "shards": ["s:"]}
    files = []
    for tree in (zeroshot, retrieval):
        files.append(tmp_path / f"{tree['name']}.yaml")
        files[-1].write_text(json.dumps(about | tree))
    (tmp_path / "seen.txt").write_text("1.png\n2.png\n4.png\n")
    results = evaluate(
        Random(1), benchmarks=files, roots={"s": tmp_path / "classes"}, trained_on=tmp_path / "seen.txt", show=False
    )
    assert [result.details["leakage"] for result in results] == [{"seen": 3, "rows": 8}, {"seen": 9, "rows": 24}]
    z, r = (result.breakdowns["meta.seen"] for result in results)
    correct = {item["id"].rpartition("/")[2]: item["correct"] for item in results[0].items}
    assert z["yes"]["top1"].value == pytest.approx(np.mean([correct[f"{n}.png"] for n in (1, 2, 4)]))
    assert (z["no"]["top1"].n, r["yes"]["t2i"].n, r["no"]["t2i"].n) == (5, 6, 10)
    assert (6 * r["yes"]["t2i"].value + 10 * r["no"]["t2i"].value) / 16 == pytest.approx(results[1].score.value)


def test_sugarcrepe_on_the_karpathy_split(shared, tmp_path: Path):
    """183 of SugarCrepe's 1,560 pictures are in the Karpathy test split, which nobody trains on."""
    convert("sugarcrepe", shared / "annotations/sugar_crepe/data", tmp_path)
    held_out = leakage.read_seen(shared / "annotations/aro/coco_karpathy_test.json")
    assert len(held_out) == 5000
    rows = read_rows(load("sugarcrepe"), Roots({"published": tmp_path}))
    pictures = {leakage.plain(row.images[0].path) for row in rows}
    assert (len(pictures), len(pictures & held_out)) == (1560, 183)
