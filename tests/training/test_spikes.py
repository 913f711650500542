"""A loss far above the usual is written down with its samples, and if asked for sends the run back; use of the peak."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit import config as configuration
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.data.mixture import open_data
from clipkit.settings import GuardConfig
from clipkit.training import guard as guarding
from clipkit.training.budget import Budget
from clipkit.training.engine import Engine
from clipkit.training.guard import Guard
from clipkit.training.loop import train
from clipkit.training.work import Work
from tests.ranks import run_ranks
from tests.training.planted import EMBED
from tests.training.runs import first_batch


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def judge(guard: Guard, *losses: float) -> list[bool]:
    found = []
    for loss in losses:
        guard.passes(torch.tensor(1.0), torch.tensor(loss))
        found.append(guard.spiked)
    return found


def test_what_counts_as_a_spike() -> None:
    guard = Guard(GuardConfig(spike=10.0))
    ordinary = [4.0 + 0.1 * (-1) ** step for step in range(guarding.ENOUGH)]
    assert not any(judge(guard, 90.0, *ordinary[1:]))  # too few are known; one of them is no measure
    usual, bound = guard.usual
    assert usual == pytest.approx(4.0, abs=0.11) and bound == pytest.approx(usual + 10 * 1.4826 * 0.1, abs=1.2)
    assert judge(guard, bound + 0.1, 3.9, float("nan")) == [True, False, False] and guard.spikes == 0
    assert not any(judge(Guard(GuardConfig(spike=0.0)), *ordinary, 1e6))


def test_a_level_that_stays_becomes_the_usual() -> None:
    guard = Guard(GuardConfig())
    judge(guard, *[1.0] * guarding.WINDOW)
    assert judge(guard, 1.05, 2.0) == [False, True]  # a deviation is taken to be a hundredth at least
    found = judge(guard, *[2.0] * guarding.WINDOW)
    assert found[0] and not found[-1] and len(guard.losses) == guarding.WINDOW


def test_a_run_taken_up_again_knows_what_is_usual() -> None:
    one, other = Guard(GuardConfig()), Guard(GuardConfig())
    judge(one, *[1.0] * 40, 3.0)
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.usual == one.usual and other.spikes == 1


def turned(steps: Collection[int]) -> Any:
    """An `Engine.embed` that at the 0-based `steps` turns all texts round."""
    numbers = count()

    def embed(engine: Engine, batch: Batch) -> Any:
        z = EMBED(engine, batch)
        return replace(z, text=-z.text) if next(numbers) in steps else z

    return embed


@pytest.fixture
def tree(tiny_tree: dict) -> dict:
    """Twelve steps, saved every four."""
    more = {"objective": {"infonce": {}}, "teacher": {"kind": "none"}, "guard": {"spike": 10.0}}
    return tiny_tree | {"samples": 192, "save_every": 64, "keep": 9} | more


def test_a_spike_is_written_down_with_its_samples(tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by itself in a run whose texts are turned round once."""
    run = configuration.validate(tree | {"model": tree["model"] | {"scale": 50.0}, "guard": {"spike": 1.0}})
    monkeypatch.setattr(guarding, "ENOUGH", 8)
    monkeypatch.setattr(Engine, "embed", turned([9]))
    folder = train(run)
    (event,) = rows(folder, "spikes")
    index, plan = open_data(run)
    assert event["step"] == 10 and event["loss"] == rows(folder, "metrics")[9]["loss"] > event["usual"]
    assert event["keys"] == [index.where(id) for id in plan.rows(9)[0].tolist()]
    assert set(event["terms"]) == {"infonce"} and event["grad_norm"] > 0
    assert not (folder / "skipped.jsonl").exists() and len(rows(folder, "metrics")) == 12


def _spiking(tree: dict, rank: int, world: int) -> None:
    Guard.usual = property(lambda guard: (2.0, 0.0 if guard.updates in (5, 6, 7) else 1e9))  # type: ignore[assignment]
    train(Config.model_validate(tree))


def test_three_in_a_row_send_the_run_back_once(tree: dict) -> None:
    """Two ranks: back to the weights of step 4; no checkpoint is made of what spiked. A second time is an error."""
    tree["guard"]["spike_patience"] = 3
    with pytest.raises(Exception, match=r"loss of 3 steps in a row was far .* again after .* of 4 updates; spikes\."):
        run_ranks(partial(_spiking, tree), 2, timeout_s=60)
    folder = configuration.validate(tree).run_folder
    assert [event["step"] for event in rows(folder, "spikes")] == [6, 7, 8, 10, 11, 12]
    assert rows(folder, "skipped") == [{"step": 8, "back_to": 4}]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000004", "step_00000008"]
    state = json.loads((folder / "checkpoints/step_00000008/state.json").read_text())
    assert state["guard"]["updates"] == 4 and len(state["guard"]["losses"]) == 5


def test_use_of_the_peak(tiny_tree: dict) -> None:
    """FLOPs are those of `clipkit plan`, without what is computed twice, of texts as long as they are."""
    tree = tiny_tree | {"engine": {"peak_tflops": 1e-3, "accumulate": 2, "checkpoint_activations": True}}
    config, _, batch = first_batch(tree)
    plan, work = Budget(configuration.validate(tiny_tree), 1), Work(config, 1e-3)
    long = torch.zeros(16, 24, dtype=torch.long)
    whole = replace(batch, text=long, negative_text=long[:, None].expand(16, 2, 24))
    assert work.flops(whole) == pytest.approx(plan.flops_a_sample)
    texts = sum(forward + backward for name, _, forward, backward in plan.flops if "text" in name)
    half = replace(batch, text=long[:, :12], negative_text=long[:, None, :12].expand(16, 2, 12))
    assert work.flops(half) == pytest.approx(plan.flops_a_sample - texts / 2)
    assert work.utilisation(1000.0, whole) == pytest.approx(1000 * plan.flops_a_sample / 1e9)
    folder = train(Config.model_validate(tiny_tree | {"samples": 16, "engine": {"peak_tflops": 1.0}}))
    (line,) = rows(folder, "metrics")
    assert 0 < line["mfu"] < 1 and line["mfu"] == pytest.approx(
        line["samples_per_s"] * work.flops(batch) / 1e12, rel=1e-6
    )
