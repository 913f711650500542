"""The learning rate as a function of the step, and who is decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipkit.config import Config
from clipkit.training.optim import build_optimizer, decays, learning_rate, set_learning_rate


def rates(**optim: object) -> list[float]:
    """Of a run of 20 steps with 4 of warm-up, at a peak of 1."""
    tree = {"batch_size": 10, "samples": 200, "optim": {"lr": 1.0, "warmup": 40, **optim}}
    config = Config.model_validate(tree)
    return [learning_rate(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_every_schedule_warms_up_to_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_to_zero() -> None:
    found = rates(schedule="cosine")
    assert found[12] == pytest.approx(0.5) and 0 < found[-1] < 0.01
    assert found[4:] == sorted(found[4:], reverse=True)


def test_wsd_stays_and_then_falls_in_a_line() -> None:
    assert rates(schedule="constant")[4:] == [1.0] * 16
    found = rates(schedule="wsd", decay=0.25)
    assert found[4:15] == [1.0] * 11
    assert found[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(schedule="wsd", decay=0.0)[4:] == [1.0] * 16


def test_only_matrices_are_decayed_and_every_group_gets_the_rate() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert [name for name, p in model.named_parameters() if decays(name, p)] == ["0.weight"]
    assert not decays("log_scale", nn.Parameter(torch.zeros(1, 1)))
    optimizer = build_optimizer(model, Config.model_validate({"optim": {"weight_decay": 0.3}}).optim)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
