"""Every packaged zero-shot set, with pictures that need not exist: constant 0, random chance, oracle 1."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from clipkit.evaluation.benchmark import load, packaged
from clipkit.evaluation.embed import Picture
from clipkit.evaluation.zeroshot import ZeroShot, _display, prompts_of
from tests.evaluation.fakes import Constant, Oracle, Random
from tests.evaluation.test_published import Named

SETS = [name for name in packaged() if load(name).kind == "zeroshot"]
PICTURES = 240


def task_of(name: str) -> ZeroShot:
    """The set's own classes and two of its prompts; at least a picture a class, in its folder."""
    benchmark = load(name)
    folders = list(benchmark.classes)
    labels = np.arange(max(PICTURES, len(folders))) % len(folders)
    pictures = [Picture("here", f"{folders[label]}/{number}.jpg") for number, label in enumerate(labels)]
    prompts = [prompts_of(_display(names), benchmark.templates[:2]) for names in benchmark.classes.values()]
    coverage = {"share": 1.0, "rows": len(pictures), "missing": {}}
    return ZeroShot(benchmark, pictures, labels, ["here"] * len(pictures), prompts, coverage)


def knows(task: ZeroShot) -> Oracle:
    truth = defaultdict(set)
    for picture, label in zip(task.pictures, task.labels):
        for prompt in task.prompts[label]:
            truth[prompt].add(repr(picture))
    return Oracle(truth)


def test_the_sets_are_counted():
    assert len(SETS) == 37


@pytest.mark.parametrize("name", SETS)
def test_constant_random_and_oracle(name: str):
    task = task_of(name)
    constant = task.score(Named(Constant()), "strict")  # type: ignore[arg-type]
    assert {key: metric.value for key, metric in constant.metrics.items() if key in ("top1", "mean_per_class")} == {
        "top1": 0.0,
        "mean_per_class": 0.0,
    }
    guessed = [task.score(Named(Random(seed)), "official").metrics["top1"] for seed in range(4)]  # type: ignore[arg-type]
    chance = 1 / len(load(name).classes)
    assert guessed[0].chance == pytest.approx(chance)
    deviation = (chance * (1 - chance) / (len(guessed) * len(task.pictures))) ** 0.5
    assert abs(np.mean([metric.value for metric in guessed]) - chance) < 4 * deviation + 1e-9
    right = task.score(Named(knows(task)), "strict")  # type: ignore[arg-type]
    called = Counter(map(tuple, task.prompts))
    shared = [number for number, prompts in enumerate(task.prompts) if called[tuple(prompts)] > 1]
    assert len(shared) == (
        4 if "imagenet" in name and len(task.prompts) == 1000 else 0
    )  # missile and sunglasses, twice
    assert right.metrics["top1"].value == pytest.approx(1 - np.isin(task.labels, shared).mean())
    assert right.metrics["mean_per_class"].value == pytest.approx(1 - len(shared) / len(task.prompts))
