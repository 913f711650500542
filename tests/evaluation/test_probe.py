"""Linear probes and Tip-Adapter: the optimum, nothing chosen on the test set, the naive loop, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipkit.errors import UserError
from clipkit.evaluation import probe
from clipkit.evaluation.labelled import read_labelled
from clipkit.evaluation.probe import Set
from clipkit.model.load import build, save
from tests.evaluation.fakes import Random, picture
from tests.model.tiny import tiny
from tests.typed import well, wrong


def clouds(n: int, classes: int = 3, spread: float = 1.0, seed: int = 0, width: int = 6) -> Set:
    """Unit vectors around one direction a class; the directions are always the same."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return Set(normalize(centres[y] + spread * torch.randn(n, width, generator=g), dim=-1), y)


def test_the_fit_is_the_optimum():
    data, l2 = clouds(60), 1e-3
    fitted = probe.fit_linear(data, 3, l2).requires_grad_()
    logits = data.x.double() @ fitted[:-1] + fitted[-1]
    (cross_entropy(logits, data.y) + l2 / 2 * fitted[:-1].square().sum()).backward()
    assert fitted.grad is not None and fitted.grad.abs().max() < 1e-6  # convex: no other point is as low
    from_elsewhere = probe.fit_linear(data, 3, l2, torch.randn(7, 3, dtype=torch.float64))
    torch.testing.assert_close(from_elsewhere[:-1], fitted.detach()[:-1], rtol=0, atol=1e-4)


def test_nothing_is_chosen_on_the_test_set():
    train, validation, test = clouds(30, seed=1), clouds(30, seed=2), clouds(90, seed=3)
    texts = normalize(torch.randn(3, 6), dim=-1)
    turned = Set(test.x, (test.y + 1) % 3)
    for run in (
        lambda t: probe.linear_probe(train, validation, t, 3),
        lambda t: probe.tip_adapter(train, validation, t, texts),
    ):
        first, second = run(test), run(turned)
        assert first.settings == second.settings and torch.equal(first.predicted, second.predicted)
    found = probe.linear_probe(train, validation, test, 3)
    tried = {}
    for l2 in probe.L2:
        fitted = probe.fit_linear(train, 3, l2)
        right = (validation.x.double() @ fitted[:-1] + fitted[-1]).argmax(1) == validation.y
        tried[l2] = right.double().mean().item()
    assert found.validation == pytest.approx(max(tried.values()), abs=0.04)
    assert tried[found.settings["l2"]] == pytest.approx(max(tried.values()), abs=0.04)


def test_oracle_and_chance():
    easy = [clouds(60, spread=0.01, seed=seed) for seed in range(3)]
    assert probe.metrics(probe.linear_probe(*easy, 3), easy[2], 3)["top1"].value == 1.0
    rng = np.random.default_rng(0)
    noise = [Set(torch.randn(n, 6), torch.from_numpy(rng.integers(0, 3, n))) for n in (60, 60, 600)]
    metric = probe.metrics(probe.linear_probe(*noise, 3), noise[2], 3)["top1"]
    assert metric.low - 0.05 <= 1 / 3 <= metric.high + 0.05 and metric.chance == 1 / 3 and metric.n == 600


def test_tip_adapter_is_its_equations():
    train, test = clouds(9), clouds(12, seed=4)
    texts = normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    found = probe.tip_adapter(train, clouds(9, seed=5), test, texts)
    alpha, beta = found.settings["alpha"], found.settings["beta"]
    for n, x in enumerate(test.x.tolist()):
        logits = [100 * sum(a * b for a, b in zip(x, text)) for text in texts.tolist()]
        for key, label in zip(train.x.tolist(), train.y.tolist()):
            logits[label] += alpha * math.exp(-beta * (1 - sum(a * b for a, b in zip(x, key))))
        assert int(np.argmax(logits)) == found.predicted[n]


def test_parts_of_a_training_set():
    labels = np.repeat([0, 1, 2], [10, 5, 2])
    rest, held = probe.split(labels)
    assert sorted([*rest, *held]) == list(range(17)) and np.bincount(labels[held]).tolist() == [2, 1, 1]
    assert np.bincount(labels[probe.few(labels, 2)]).tolist() == [2, 2, 2]
    assert probe.few(labels, 2).tolist() == probe.few(labels, 2).tolist() != probe.few(labels, 2, seed=1).tolist()
    with pytest.raises(UserError, match="--shots 3: a class has only 2"):
        probe.few(labels, 3)
    with pytest.raises(UserError, match="one training picture only"):
        probe.split(np.array([0, 0, 1]))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for part, count in (("train", 6), ("test", 3)):
        for c, name in enumerate(("red_fox", "cat")):
            for n in range(count):
                path = tmp_path / part / name / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(100 * c + n + 50 * (part == "test")).save(path)
    return tmp_path


def test_class_folders(folders: Path):
    data = read_labelled(str(folders / "train"))
    assert data.classes == ["cat", "red_fox"] and data.labels.tolist() == [0] * 6 + [1] * 6
    embedded = probe.embed(Random(), data)
    assert embedded.x.shape == (12, 24) and torch.allclose(embedded.x.norm(dim=1), torch.ones(12))
    turned = data.renumbered(["red_fox", "cat"], "x")
    assert turned.labels.tolist() == [1] * 6 + [0] * 6
    with pytest.raises(UserError, match="x: class red_fox is not among the training classes; did you mean red_foxes"):
        data.renumbered(["red_foxes", "cat"], "x")
    with pytest.raises(UserError, match="should hold class folders with pictures, found none"):
        read_labelled(str(folders / "train" / "cat"))


def test_the_command(folders: Path):
    torch.manual_seed(0)
    save(build(tiny()).eval(), folders / "model")
    words = ("probe", folders / "model", "--train", folders / "train", "--test", folders / "test")
    said = well(*words, "--shots", "2", "--json", folders / "out.json")
    assert [line.split("\t")[0] for line in said.splitlines()] == ["method", "zero-shot", "linear probe", "Tip-Adapter"]
    tree = json.loads((folders / "out.json").read_text())
    assert tree["pictures"] == {"train": 4, "validation": 2, "test": 6}
    assert {m["metrics"]["top1"]["n"] for m in tree["methods"]} == {6}
    assert len(well(*words).splitlines()) == 3
    assert "no such file" in wrong(*words, "--templates", folders / "none.txt")
