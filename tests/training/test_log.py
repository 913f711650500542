"""What a line of the log says of a step, and that saying it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkit.config import Config
from clipkit.errors import UserError
from clipkit.training.loop import train


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_is_sampled_leaves_the_run_as_it_is(tiny_tree: dict):
    """A line every step, and one at the end: the same bits in model, teacher, moments and margins."""
    tree = tiny_tree | {"samples": 64, "objective": tiny_tree["objective"] | {"rank": {"weight": 0.5}, "macl": {}}}
    often, once = (
        train(Config.model_validate(tree | {"name": name, "log_every": every}))
        for name, every in (("often", 1), ("once", 1000))
    )
    for name in ("model", "teacher", "optimizer", "terms"):
        expected, got = (load_file(run / f"checkpoints/step_00000004/{name}.safetensors") for run in (often, once))
        assert expected.keys() == got.keys() and all(torch.equal(x, got[key]) for key, x in expected.items()), name
    assert [line["step"] for line in lines(once)] == [4]
    found, last = lines(often), lines(once)[0]
    assert {name: x for name, x in found[-1].items() if "_" not in name} == {
        name: x for name, x in last.items() if "_" not in name
    }
    for line in found:
        pulls = {name.partition("/")[2]: share for name, share in line.items() if name.startswith("pull/")}
        assert pulls.keys() == tree["objective"].keys() and sum(pulls.values()) == pytest.approx(1.0)
        assert line["temperature"] == pytest.approx(1 / line["scale"])
        assert line["temperature/macl"] == pytest.approx((1 + 0.5 * line["cosine/positive"]) / line["scale"])
        assert line["same_picture"] == 0.0


def test_a_run_gone_to_ruin_is_logged_until_the_guard_ends_it(tiny_tree: dict):
    """Its scale is 0 before its loss is nan: the line leaves the temperature out, which is infinite."""
    tree = tiny_tree | {"optim": {"lr": 1000.0, "schedule": "constant"}, "objective": {"infonce": {}}}
    config = Config.model_validate(tree | {"teacher": {"kind": "none"}})
    with pytest.raises(UserError, match="steps in a row were skipped, their loss or gradient not finite"):
        train(config)
    ruined = [line for line in lines(config.run_folder) if line["scale"] == 0.0]
    assert ruined and all("temperature" not in line for line in ruined)
