"""Terms that remember something: what they remember is part of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkit.config import Config
from clipkit.errors import UserError
from clipkit.training.loop import train
from tests.training.runs import finish, launch


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_taken_up_again_keeps_its_margins(tiny_tree: dict, tmp_path: Path):
    """Cut off after its first checkpoint: the same bits at the end as a run left in peace."""
    of_samples = {"sogclr": {}, "isogclr": {"tau": 0.1}, "fastclip": {"version": "v2", "tau": 0.1}}
    tree = tiny_tree | {
        "objective": {"infonce": {}, "rank": {}} | of_samples,
        "teacher": {"kind": "none"},
        "samples": 128,
        "save_every": 64,
    }
    peace = train(Config.model_validate(tree | {"name": "peace"}))
    folder = train(Config.model_validate(tree | {"name": "cut"}))
    first, last = sorted((folder / "checkpoints").glob("step_*"))
    margins = [load_file(checkpoint / "terms.safetensors")["rank.margin"] for checkpoint in (first, last)]
    assert margins[0].shape == (2,) and margins[0].any() and not torch.equal(*margins)
    visits = load_file(last / "terms.safetensors")["fastclip.visits"]
    assert len(visits) == 48 and visits.nan_to_num().sum() == 128
    shutil.rmtree(last)
    train(Config.model_validate(tree | {"name": "cut"}), resume=True)
    for name in ("terms", "model", "optimizer"):
        expected, got = (load_file(run / "checkpoints" / last.name / f"{name}.safetensors") for run in (peace, folder))
        assert expected.keys() == got.keys()
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), name
    assert losses(folder) == losses(peace)
    shutil.rmtree(last)
    without = tree | {"name": "cut", "objective": {"infonce": {}}}
    with pytest.raises(UserError, match="holds the state of fastclip, isogclr, rank, sogclr, not in use here"):
        train(Config.model_validate(without), resume=True)


@pytest.mark.slow
def test_what_is_known_of_samples_moves_between_world_sizes(tiny_tree: dict, tmp_path: Path):
    """Begun on two ranks, ended on one, two and four: the losses and the state of a run on one."""
    objective = {"infonce": {}, "fastclip": {"version": "v2", "tau": 0.1, "visits": 4}}
    tree = tiny_tree | {"objective": objective, "teacher": {"kind": "none"}, "save_every": 160, "keep": 9}
    whole, two = train(Config.model_validate(tree | {"name": "whole"})), tmp_path / "runs/two"
    finish(launch(tree | {"name": "two"}, tmp_path / "two.yaml", ranks=2))
    last = "checkpoints/step_00000020"
    expected = load_file(whole / last / "terms.safetensors")
    assert expected["fastclip.visits"].nan_to_num().sum() == 320
    for ranks in (2, 1, 4):
        folder = two
        if ranks != 2:
            folder = Path(shutil.copytree(two, two.with_name(f"on_{ranks}")))
            shutil.rmtree(folder / last)
            finish(launch(tree | {"name": folder.name}, tmp_path / f"{ranks}.yaml", ranks=ranks, resume=True))
        assert losses(folder) == pytest.approx(losses(whole), abs=1e-4)
        got = load_file(folder / last / "terms.safetensors")
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=5e-2, equal_nan=True, msg=f"{name} on {ranks}")


def test_without_such_terms_there_is_no_such_file(tiny_tree: dict):
    folder = train(Config.model_validate(tiny_tree | {"samples": 16, "optim": {}}))
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    assert not (checkpoint / "terms.safetensors").exists()


def test_a_run_taken_up_again_keeps_its_queue(tiny_tree: dict):
    """Keys of the batches before the cut are rivals behind it."""
    tree = tiny_tree | {
        "objective": {"mochi": {"queue": 40, "hardest": 8, "mixed": 4, "pulled": 4}},
        "samples": 64,
        "save_every": 32,
        "optim": {"lr": 1e-3},
    }
    peace = train(Config.model_validate(tree | {"name": "peace"}))
    folder = train(Config.model_validate(tree | {"name": "cut"}))
    first, last = sorted((folder / "checkpoints").glob("step_*"))
    assert load_file(first / "terms.safetensors")["mochi.image"].shape == (32, 16)
    shutil.rmtree(last)
    train(Config.model_validate(tree | {"name": "cut"}), resume=True)
    for name in ("terms", "model"):
        expected, got = (load_file(run / "checkpoints" / last.name / f"{name}.safetensors") for run in (peace, folder))
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), name
    assert load_file(last / "terms.safetensors")["mochi.text"].shape == (40, 16)
    assert losses(folder) == losses(peace)
