"""Merged models: weights by hand, what fits together, the sweep over shares, soups; what a fine-tune forgot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import clipkit
from clipkit import merge
from clipkit.errors import UserError
from clipkit.evaluation.forgetting import start_of
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.load import save
from clipkit.model.weights import mean_of_weights
from clipkit.settings import TextTower
from tests.evaluation.fakes import write_benchmark
from tests.evaluation.report_runs import compositional, zeroshot
from tests.model.tiny import TEXT, tiny, tiny_resnet
from tests.typed import run as typed
from tests.typed import well, wrong

NOTHING = merge.Benchmarks()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(3):
        torch.manual_seed(seed)
        save(build(tiny()).eval(), folder / str(seed))
    return [str(folder / str(seed)) for seed in range(3)]


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path / "own", per_form=3)[0]


def state(model: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(model) / "model.safetensors")


def test_weights_are_the_sum_of_the_shares(models: list[str], tmp_path: Path):
    merged = merge.interpolate(models[0], models[1], [0, 0.3, 1], tmp_path, NOTHING)
    a, b, between = state(models[0]), state(models[1]), state(merged[1].folder)
    for name, x in between.items():
        assert torch.equal(x, (0.7 * a[name].double() + 0.3 * b[name].double()).to(x.dtype)), name
    for whole, one in ((merged[0], models[0]), (merged[2], models[1])):
        assert all(torch.equal(x, state(whole.folder)[name]) for name, x in state(one).items())
    assert json.loads((merged[1].folder / "model.json").read_text())["merged"] == {models[0]: 0.7, models[1]: 0.3}
    assert clipkit.load(merged[1].folder).embed_texts(["a dog"]).shape == (1, 16)


def test_counts_stay_whole_and_equal_models_give_themselves(models: list[str], tmp_path: Path):
    save(build(tiny_resnet()), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "again")
    own = state(tmp_path / "one")
    counts = {name: x + 7 for name, x in own.items() if not x.is_floating_point()}
    assert counts
    save_file(own | counts, tmp_path / "again/model.safetensors")
    (soup,) = merge.uniform_soup([f"{tmp_path}/one", f"{tmp_path}/again"], tmp_path / "out", NOTHING)
    assert all(torch.equal(x, own[name]) for name, x in state(soup.folder).items())


def test_uniform_soup(models: list[str], tmp_path: Path):
    (soup,) = merge.uniform_soup(models, tmp_path, NOTHING)
    tables = [state(model) for model in models]
    for name, x in state(soup.folder).items():
        if x.is_floating_point():
            torch.testing.assert_close(x, sum(table[name] for table in tables) / 3, rtol=0, atol=1e-6)


def test_greedy_soup_keeps_what_does_not_harm(models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Scores by how much of which model is in: the second is the best, the third helps, the first harms."""
    own = [float(state(model)["text_tower.positional_embedding"][0, 0]) for model in models]

    class Scored:
        def __init__(self, value: float) -> None:
            self.score = self
            self.value = value

    def run(_: merge.Benchmarks, model: DualEncoder, *__: object) -> list[Scored]:
        x = model.text_tower.positional_embedding[0, 0].item()
        known = {own[0]: 0.1, own[1]: 0.5, own[2]: 0.3, (own[1] + own[2]) / 2: 0.5}
        return [Scored(next((v for k, v in known.items() if abs(k - x) < 1e-7), 0.4))]

    monkeypatch.setattr(merge.Benchmarks, "run", run)
    (soup,) = merge.greedy_soup(models, "own", tmp_path, NOTHING)
    assert soup.shares == {models[1]: 0.5, models[2]: 0.5}


def test_other_architectures_are_refused_in_one_message(models: list[str], tmp_path: Path):
    save(build(tiny(text=TextTower(**TEXT | {"layers": 1}))), tmp_path / "short")
    message = wrong("merge", models[0], tmp_path / "short", "--out", tmp_path / "out")
    assert message.startswith(
        f"{tmp_path}/short and {models[0]}: cannot be merged, they are of different architectures:"
    )
    assert "text.layers: 1 there, 2 here" in message and len(message.splitlines()) <= 4
    save(build(tiny_resnet()), tmp_path / "other")
    assert "different architectures" in wrong("merge", models[0], tmp_path / "other", "--out", tmp_path / "out")
    quick = build(tiny())
    quick.spec = quick.spec | {"activation": "quickgelu"}
    with pytest.raises(UserError, match="activation"):
        mean_of_weights([("a", 0.5, build(tiny())), ("b", 0.5, quick)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--alphas", "0,1.5"], "should lie between 0 (the first model) and 1 (the second), found 1.5"),
        (["--alphas", "0,x"], "--alphas 0,x: should be numbers"),
        (["--alphas", "0,0"], "should be different shares, found 0, 0"),
        (["--soup", "greedy"], "--soup greedy and --held-out NAME belong together"),
        (["--held-out", "world"], "--soup greedy and --held-out NAME belong together"),
        (["--soup", "greedy", "--held-out", "world", "--suite", "world"], "report it on other benchmarks"),
    ],
)
def test_mistakes(models: list[str], tmp_path: Path, words: list[str], message: str):
    assert message in wrong("merge", *models[:2], "--out", tmp_path, *words)


def test_merging_a_model_with_itself_is_a_mistake(models: list[str], tmp_path: Path):
    assert "give at least two models, each once" in wrong("merge", models[0], models[0], "--out", tmp_path)
    assert "--alphas are for two models, found 3" in wrong("merge", *models, "--out", tmp_path)


def test_the_sweep_in_one_command(models: list[str], benchmark: Path, tmp_path: Path):
    out = tmp_path / "merged"
    said = well(
        "merge", *models[:2], "--out", out, "--alphas", "0,0.5,1", "--benchmark", benchmark, "--json", out / "m.json"
    )
    assert said.splitlines()[0].split("\t") == ["model", "own accuracy/micro", "folder"]
    assert [line.split("\t")[0] for line in said.splitlines()[1:]] == ["alpha 0", "alpha 0.5", "alpha 1"]
    found = json.loads((out / "m.json").read_text())
    assert [list(one["shares"].values()) for one in found] == [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    alone = json.loads(well("eval", models[1], "--benchmark", benchmark, "--json", "-"))
    assert found[2]["scores"]["own"]["value"] == pytest.approx(alone[0]["metrics"]["accuracy/micro"]["value"], abs=1e-6)
    page = (out / "report.html").read_text()
    assert all(name in page for name in ("alpha 0", "alpha 0.5", "alpha 1"))


def test_the_sweep_trades_recognition_for_composition(tmp_path: Path):
    """Against the first: loss of zero-shot, gain of compositional accuracy; who is beaten; what is chosen."""
    made = []
    for alpha, skills in ((0, (5, 9)), (0.5, (7, 8)), (0.75, (6, 7)), (1, (8, 5))):
        one = merge.Merged(f"alpha {alpha:g}", tmp_path / f"{alpha}", {})
        one.results = [compositional(skills[0]), zeroshot(skills[1])]
        made.append(one)
    columns, lines = merge.rows(made)
    assert columns[-4:] == ["zero-shot loss", "compositional gain", "front", "folder"]
    found = [one.point for one in made]
    for line, point in zip(lines, found):
        assert point and found[0]
        assert line[-4] == f"{100 * (found[0].recognition - point.recognition) + 0.0:+.1f}"
        assert line[-3] == f"{100 * (point.composition - found[0].composition) + 0.0:+.1f}"
    assert [line[-2] for line in lines] == ["yes", "yes", "", "yes"]
    assert [merge.choice(made, loss).name for loss in (0.0, 0.15, 0.5)] == ["alpha 0", "alpha 0.5", "alpha 1"]
    for one in made:
        one.results = one.results[:1]
    assert merge.rows(made)[0] == ["model", "pairs accuracy/macro", "folder"]
    with pytest.raises(UserError, match="evaluate zero-shot and compositional benchmarks"):
        merge.choice(made, 0.1)


def test_a_fine_tune_is_set_beside_its_start(models: list[str], benchmark: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(models[1], run / "checkpoints/step_00000001")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"start": models[0], "name": ""}}))
    said = well("eval", run, "--benchmark", benchmark)
    (line,) = json.loads((run / "forgetting.json").read_text())
    before, after = (
        json.loads((folder / "results/own.json").read_text())["metrics"]["accuracy/micro"]["value"]
        for folder in (run / "start", run)
    )
    assert line["start"] == pytest.approx(before, abs=1e-6) and line["now"] == pytest.approx(after, abs=1e-6)
    assert (
        line["difference"] == pytest.approx(after - before, abs=1e-6)
        and line["low"] <= line["difference"] <= line["high"]
    )
    assert "difference" in said and 0 < line["p"] <= 1
    page = (run / "report.html").read_text()
    assert "start" in page and str(run.name) in page
    shutil.rmtree(run / "start")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"start": str(tmp_path / "gone")}}))
    done = typed("eval", run, "--benchmark", benchmark)
    assert done.status == 0 and f"began from {tmp_path}/gone, which is not set beside it" in done.err
    said = typed("eval", run, "--benchmark", benchmark, "--no-start").err
    assert said.startswith("report: ") and said.count("\n") == 1
    assert not (run / "start").exists()


@pytest.mark.parametrize(
    ("model", "start"), [({"name": "ViT-B-32:openai"}, "ViT-B-32:openai"), ({"name": "ViT-B-32"}, ""), ({}, "")]
)
def test_what_a_run_began_from(tmp_path: Path, model: dict, start: str):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    assert start_of(tmp_path) == start
