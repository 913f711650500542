"""A sweep of tiny runs: equal conditions, one table, nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit import config as configuration
from clipkit import sweep
from clipkit.errors import UserError
from tests.evaluation.fakes import write_benchmark
from tests.training.conftest import degla_tree, tiny_samples
from tests.typed import well, wrong


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """Conditions: a tiny run of two steps on 48 pictures, judged on one compositional benchmark."""
    from clipkit.data.build import write_shards

    write_shards(tiny_samples(48), tmp_path / "shards", per_shard=48, name="tiny", progress=False)
    path, _ = write_benchmark(tmp_path / "own")
    (tmp_path / "suites.yaml").write_text(f"mine: ['{path}']")
    tree = degla_tree(f"{tmp_path}/shards/tiny-*.tar", tmp_path)
    for method in ("objective", "teacher"):
        del tree[method]
    return tree | {"name": "conditions", "samples": 32, "suite": f"{tmp_path}/suites.yaml:mine"}


def swept(base: dict[str, Any], tmp_path: Path, *methods: str, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(base))
    return sweep.run(methods, base=str(file), out=tmp_path / "sweep", seeds=seeds)


def test_methods_differ_in_what_is_theirs_alone(base: dict[str, Any], tmp_path: Path):
    tree = swept(base, tmp_path, "clip", "ce_clip", seeds=(0, 3))
    configs = [
        configuration.load(tmp_path / f"sweep/{name}/{s}/config.yaml") for name in ("clip", "ce_clip") for s in (0, 3)
    ]
    common = configuration.load(tmp_path / "base.yaml")
    for config, seed in zip(configs, (0, 3, 0, 3)):
        assert (config.seed, config.samples, config.batch_size, config.optim) == (seed, 32, 16, common.optim)
        assert config.model.image == common.model.image and config.data.train == common.data.train
    assert configs[0].objective == {"infonce": {}} and configs[0].data.negatives == 0
    assert (
        set(configs[2].objective) == {"infonce", "imc", "rank"} and configs[2].data.negatives == common.data.negatives
    )

    assert json.loads((tmp_path / "sweep/sweep.json").read_text()) == tree == sweep.read(tmp_path / "sweep/sweep.json")
    runs = tree["methods"]["ce_clip"]["runs"]
    assert [run["seed"] for run in runs] == [0, 3] and all(run["seconds"] > 0 for run in runs)
    value, low, high = sweep.over_seeds(runs, "own")
    assert value == pytest.approx(sum(run["cells"]["own"][0] for run in runs) / 2) and low <= value <= high
    table = (tmp_path / "sweep/sweep.md").read_text()
    assert table.startswith("All: 2 steps of 16 pairs from random weights, 2 negatives") and "seeds: 0, 3." in table
    assert table.count("\n| `") == 2


def test_nothing_is_done_twice(base: dict[str, Any], tmp_path: Path):
    first = swept(base, tmp_path, "clip")
    weights = next((tmp_path / "sweep/clip/0/checkpoints").rglob("*.safetensors"))
    before = weights.stat().st_mtime_ns
    assert swept(base, tmp_path, "clip") == first and weights.stat().st_mtime_ns == before


def test_one_that_cannot_be_run_says_why_and_the_others_go_on(base: dict[str, Any], tmp_path: Path):
    own = tmp_path / "own.yaml"  # a file of one's own, which fails too
    own.write_text("base: clip\nname: mine\n")
    base["data"] |= {"cache_image_features": True, "augment": "none"}
    base["model"] |= {"lock_image": True}  # the method's own business: clip does not lock it
    assert swept(base, tmp_path, str(own))["methods"].keys() == {"own"}  # none can be run: still a table
    tree = swept(base, tmp_path, "clip", "lit")
    assert tree["methods"]["clip"]["runs"] == [] and len(tree["methods"]["lit"]["runs"]) == 1
    row = next(line for line in sweep.markdown(tree).splitlines() if line.startswith("| `clip`"))
    assert "not run" in row and "needs model.lock_image: true" in row


def test_conditions_without_benchmarks_and_strange_files(base: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError, match="suite: name the benchmarks"):
        swept(base | {"suite": ""}, tmp_path, "clip")
    with pytest.raises(UserError, match="at least one seed"):
        swept(base, tmp_path, "clip", seeds=())
    with pytest.raises(UserError, match="two of these are alike: clip, clip"):
        swept(base, tmp_path, "clip", "clip")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not the sweep.json"):
        sweep.read(tmp_path / "x.json")


def test_by_kind_runs_what_takes_negatives_once_a_kind(base: dict[str, Any], tmp_path: Path):
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(base))
    kinds = ("swap", "replace+shuffle")
    tree = sweep.run(["clip", "negclip"], base=str(file), out=tmp_path / "sweep", seeds=(0,), kinds=kinds)
    assert list(tree["methods"]) == ["clip", "negclip.swap", "negclip.replace+shuffle"]
    for group in kinds:
        config = configuration.load(tmp_path / f"sweep/negclip.{group}/0/config.yaml")
        assert config.data.negative_kinds == group.split("+") and config.data.negatives == base["data"]["negatives"]
    assert all(len(method["runs"]) == 1 for method in tree["methods"].values())


def test_zero_shot_is_the_mean_of_independent_sets():
    from clipkit.evaluation.result import Metric

    value, low, high = sweep._mean([Metric(0.5, 0.4, 0.6, 10), Metric(0.7, 0.6, 0.9, 10)])
    assert value == pytest.approx(0.6)
    assert low == pytest.approx(0.6 - 0.02**0.5 / 2) and high == pytest.approx(0.6 + 0.05**0.5 / 2)


def test_sweep_takes_methods_and_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from clipkit import methods

    calls = []
    monkeypatch.setattr(sweep, "run", lambda names, **rest: calls.append((names, rest)))
    monkeypatch.setattr(sweep, "markdown", lambda tree: "a table\n")
    assert (
        well("sweep", "clip", "samples=64", "degla", "--seeds", "0,2", "--out", tmp_path, "--on", "mine") == "a table\n"
    )
    assert calls.pop() == (
        ["clip", "degla"],
        {"base": "mine", "out": tmp_path, "seeds": [0, 2], "settings": ["samples=64"], "kinds": []},
    )
    well("sweep", "clip", "--by-kind", "swap_nouns,negate+reshuffle")
    assert calls.pop()[1]["kinds"] == ["swap_nouns", "negate+reshuffle"]
    well("sweep")
    assert calls.pop()[0] == methods.every()
    assert "--seeds 0,x: should be whole numbers" in wrong("sweep", "clip", "--seeds", "0,x")
