"""Checkpoints by the clock: rank 0's, in the all-reduce that there is anyway, and nothing else changes."""

from __future__ import annotations

import itertools
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from clipkit import config as configuration
from clipkit.settings import GuardConfig
from clipkit.training import guard as guarding
from clipkit.training.guard import Guard
from clipkit.training.loop import train
from tests.ranks import run_ranks


def test_a_checkpoint_when_the_minutes_have_passed(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read once to begin with, once a step and once a save, and goes on by 20 s each time."""
    tree = tiny_tree | {"samples": 96, "keep": 9}
    peace = train(configuration.validate(tree | {"name": "peace"}))
    readings = itertools.count(0, 20)
    monkeypatch.setattr(guarding, "monotonic", lambda: next(readings))
    folder = train(configuration.validate(tree | {"name": "late", "save_minutes": 0.6}))
    steps = [path.name for path in sorted((folder / "checkpoints").glob("step_*"))]
    assert steps == ["step_00000002", "step_00000004", "step_00000006"]
    for dropped in steps[1:]:
        shutil.rmtree(folder / "checkpoints" / dropped)
    train(configuration.validate(tree | {"name": "late", "save_minutes": 0.6}), resume=True)
    for name in ("model", "teacher", "optimizer", "rng_0"):
        want, got = (load_file(one / f"checkpoints/{steps[-1]}/{name}.safetensors") for one in (peace, folder))
        assert want.keys() == got.keys() and all(torch.equal(value, got[key]) for key, value in want.items()), name


def _clocks(rank: int, _world: int) -> tuple[list[bool], int]:
    """Rank 1's clock is far ahead all the time; rank 0's is late from the third step on, and a save follows there."""
    steps, calls, plain = 5, 0, dist.all_reduce

    def counted(*args: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        return plain(*args, **more)  # type: ignore[arg-type]

    dist.all_reduce = counted
    now = 0.0
    guarding.monotonic = lambda: now
    guard, found = Guard(GuardConfig(), save_minutes=1.0), []
    for step in range(steps):
        now = 1e6 * (step + 1) if rank else 20.0 * (step + 1)
        guard.passes(torch.tensor(1.0), torch.tensor(1.0))
        found.append(guard.save_due)
        if guard.save_due:
            guard.saved()
    return found, calls


def test_the_first_ranks_clock_decides_for_all() -> None:
    for found, calls in run_ranks(_clocks, 2, timeout_s=60):
        assert found == [False, False, True, False, False] and calls == 5


def _late(tree: dict, rank: int, _world: int) -> list[str]:
    """A run by a clock that goes on by 20 s at each look on rank 0, and by a year on rank 1."""
    readings = itertools.count(0, 3e7 if rank else 20)
    guarding.monotonic = lambda: next(readings)
    folder = train(configuration.validate(tree))
    return [path.name for path in sorted((folder / "checkpoints").glob("step_*"))]


def test_two_ranks_save_the_same_steps(tiny_tree: dict) -> None:
    tree = tiny_tree | {"samples": 96, "keep": 9, "save_minutes": 0.6, "engine": {"timeout_s": 60}}
    for steps in run_ranks(partial(_late, tree), 2, timeout_s=60):
        assert steps == ["step_00000002", "step_00000004", "step_00000006"]


def test_without_it_nothing_is_ever_due(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(GuardConfig())
    monkeypatch.setattr(guarding, "monotonic", lambda: 1e12)
    assert guard.passes(torch.tensor(1.0), torch.tensor(1.0)) and not guard.save_due
