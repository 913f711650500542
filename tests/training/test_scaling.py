"""float16: losses scaled, overflows skipped without a trace and without blame, the scale in the checkpoint."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkit import config as configuration
from clipkit.training import scaling
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from clipkit.training.scaling import LossScale
from tests.ranks import run_ranks
from tests.training.planted import plant
from tests.training.runs import cut, losses, same_bits, whole_and_cut

TOO_LARGE = 2.0**22
"""Gradients of the tiny run overflow a few times until it is small enough."""


def scale_of(checkpoint: Path) -> dict[str, float]:
    return json.loads((checkpoint / "state.json").read_text())["engine"]["scaling"]


@pytest.fixture
def tree(tiny_tree: dict) -> dict:
    return tiny_tree | {"samples": 192, "save_every": 96, "keep": 9, "engine": {"precision": "fp16"}}


def test_it_halves_at_once_and_doubles_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PATIENT", 3)
    scale, found = LossScale(4.0), []
    for fits in (False, True, True, False, True, True, True, True, False, False, False):
        (scale.fits if fits else scale.overflowed)()
        found.append(scale.value)
    assert found == [2, 2, 2, 1, 1, 1, 2, 2, 1, 1, 1]
    gradient = torch.tensor([3.0, float("inf")])
    LossScale(1024.0).undo([gradient])
    assert gradient.tolist() == [3 / 1024, float("inf")]


def test_the_losses_are_near_those_of_float32(tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "FIRST", 256.0)
    plain, half = (
        train(configuration.validate(tree | {"name": precision, "engine": {"precision": precision}}))
        for precision in ("fp32", "fp16")
    )
    assert losses(half) == pytest.approx(losses(plain), abs=2e-2) and losses(half) != losses(plain)
    assert scale_of(half / "checkpoints/step_00000012") == {"value": 256.0, "taken": 12}


def test_overflows_leave_no_trace_and_no_blame(tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped while the scale falls, never sent back for it; taken up again with the scale that was found."""
    monkeypatch.setattr(scaling, "FIRST", TOO_LARGE)
    tree |= {"guard": {"patience": 1}, "save_every": 16, "keep": 20}
    peace = train(configuration.validate(tree | {"name": "peace"}))
    rows = [json.loads(line) for line in (peace / "metrics.jsonl").read_text().splitlines()]
    skipped = rows[-1]["skipped_steps"]
    assert 0 < skipped < 9 and all("loss" in row for row in rows)
    assert [row["step"] for row in map(json.loads, (peace / "skipped.jsonl").read_text().splitlines())] == list(
        range(1, skipped + 1)
    )
    found = [peace / f"checkpoints/step_{step:08d}" for step in (1, skipped, 12)]
    assert scale_of(found[1])["value"] == scale_of(found[2])["value"] == TOO_LARGE / 2**skipped
    for name in ("model", "teacher"):
        first, still = (load_file(one / f"{name}.safetensors") for one in found[:2])
        assert all(torch.equal(x, still[key]) for key, x in first.items())
    again = Path(shutil.copytree(peace, peace.with_name("again")))
    for _ in range(9):
        cut(again)
    train(configuration.validate(tree | {"name": "again"}), resume=True)
    same_bits(peace, again)
    assert scale_of(again / found[2].relative_to(peace)) == scale_of(found[2])


def test_a_loss_that_is_not_finite_is_the_runs_own(tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration.validate(tree | {"save_every": 16})
    monkeypatch.setattr(Engine, "embed", plant(config, [2, 3, 4], "loss"))
    events = (train(config) / "skipped.jsonl").read_text().splitlines()
    assert json.loads(events[-1])["back_to"] == 2


def _two(tree: dict, rank: int, world: int) -> list[tuple[Path, Path]]:
    scaling.FIRST = TOO_LARGE
    trees = [
        tree | {"out": tree["out"].replace("{name}", f"{kind}/{{name}}"), "engine": tree["engine"] | {"kind": kind}}
        for kind in ("ddp", "fsdp")
    ]
    return [whole_and_cut(each, rank, world) for each in trees]


def test_ranks_skip_together(tree: dict) -> None:
    """DDP and FSDP: the same steps, the same losses, and the same bits when taken up again."""
    (ddp, _), (fsdp, _) = runs = run_ranks(partial(_two, tree), 2, timeout_s=120)[0]
    for peace, again in runs:
        same_bits(peace, again)
    assert losses(fsdp) == pytest.approx(losses(ddp), abs=1e-2)
    states = [scale_of(folder / "checkpoints/step_00000012") for folder in (ddp, fsdp)]
    assert states[0] == states[1] and states[0]["value"] < TOO_LARGE
