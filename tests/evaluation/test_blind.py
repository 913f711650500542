"""What can be had without looking: classes and retrieval."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipkit.evaluation.run import evaluate
from clipkit.evaluation.stats import deranged
from tests.evaluation.fakes import Constant, Oracle, Random, name_of, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine cats, one dog; each picture with two captions."""
    for number in range(10):
        name = "dog" if number == 9 else "cat"
        (tmp_path / "classes" / name).mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "classes" / name / f"{number}.png")
        picture(number).save(tmp_path / "classes" / f"{number}.png")
        (tmp_path / "classes" / f"{number}.json").write_text(json.dumps({"captions": [f"a {number}", f"b {number}"]}))
    about = {"version": "1", "title": "x", "sources": {"s": {"about": "here"}}}
    classes = {"name": "z", "kind": "zeroshot", "images": ["s:"], "classes": ["cat", "dog"], "templates": ["{}"]}
    for tree in (classes, {"name": "r", "kind": "retrieval", "shards": ["s:"]}):
        (tmp_path / f"{tree['name']}.yaml").write_text(json.dumps(about | tree))
    return tmp_path


def run(model, folder: Path, name: str):
    return evaluate(model, benchmarks=[folder / f"{name}.yaml"], roots={"s": folder / "classes"}, show=False)[0]


def unit(model, key: str):
    return model.vector(key) / np.linalg.norm(model.vector(key))


def test_a_class_by_the_mean_picture(folder: Path):
    seen = set()
    for seed in range(6):
        model = Random(seed)
        mean = np.mean([unit(model, name_of(picture(number))) for number in range(10)], axis=0)
        cats = float(mean @ unit(model, "cat")) > float(mean @ unit(model, "dog"))
        blind = run(model, folder, "z").baselines["text_prior"]
        assert blind["metrics"] == pytest.approx({"top1": 0.9 if cats else 0.1, "mean_per_class": 0.5})
        assert blind["by_category"]["cat"]["top1"] == float(cats)
        seen.add(cats)
    assert seen == {True, False}
    assert run(Constant(), folder, "z").baselines["shuffled_pictures"]["metrics"]["top1"] == 0.5


def test_retrieval_of_other_pictures(folder: Path):
    truth = {f"{letter} {n}": {name_of(picture(n))} for letter in "ab" for n in range(10)}
    result = run(Oracle(truth), folder, "r")
    assert result.score.value == 1.0
    # Every picture stands in another's place: what was found is always wrong.
    assert result.baselines["shuffled_pictures"]["metrics"]["t2i/r1"] == 0.0
    model = Random(1)
    images, texts = ([unit(model, key) for key in keys] for keys in ([name_of(picture(n)) for n in range(10)], truth))
    order = np.argsort([-float(np.mean(images, axis=0) @ text) for text in texts])
    owners = [int(text.split()[1]) for text in truth]
    metrics = run(model, folder, "r").baselines["text_prior"]["metrics"]
    for k in (1, 5, 10):
        assert metrics[f"i2t/r{k}"] == pytest.approx(len({owners[t] for t in order[:k]}) / 10)
        assert metrics[f"t2i/r{k}"] == pytest.approx(k / 10)  # all pictures tie


def test_deranged_leaves_nothing_in_its_place():
    for n in (2, 3, 50):
        order = deranged(n)
        assert sorted(order.tolist()) == list(range(n)) and (order != np.arange(n)).all()
