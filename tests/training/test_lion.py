"""Lion against a plain loop and by hand; its one moment through checkpoints, alone and under ZeRO."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clipkit import config as configuration
from clipkit.errors import UserError
from clipkit.training.lion import Lion
from clipkit.training.loop import train
from clipkit.training.optim import build_optimizer
from tests.ranks import run_ranks
from tests.training.runs import cut, same_bits, whole_and_cut


def test_a_step_by_hand() -> None:
    """β = (0.9, 0.99), lr 0.1, λ 0.5: decay first shortens 1 to 0.95; the last weight has nothing to follow."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    optimizer = Lion([weight], lr=0.1, weight_decay=0.5)
    optimizer.state[weight]["exp_avg"] = torch.tensor([1.0, -1.0, 0.1, 0.0], dtype=torch.float64)
    weight.grad = torch.tensor([-8.0, -8.0, -1.0, 0.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.85, 1.05, 1.05, 0.95]).double(), rtol=0, atol=1e-7)
    expected = torch.tensor([0.91, -1.07, 0.089, 0.0]).double()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], expected, rtol=0, atol=1e-7)


def test_against_a_plain_loop() -> None:
    """Two groups with settings of their own, a parameter that has a gradient only now and then."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,), (2, 2))]
    fast, slow = [nn.Parameter(x.clone()) for x in start], [x.clone() for x in start]
    rates, decay, moments = (0.01, 0.03, 0.03), (0.1, 0.0, 0.0), [torch.zeros_like(x) for x in start]
    groups = [{"params": fast[:1], "weight_decay": 0.1, "lr": 0.01}, {"params": fast[1:], "lr": 0.03}]
    optimizer = Lion(groups, lr=1.0, betas=(0.8, 0.95))
    for step in range(12):
        for i, (weight, moment) in enumerate(zip(slow, moments)):
            slope = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            fast[i].grad = None if i == 2 and step % 3 == 0 else slope
            if fast[i].grad is None:
                continue
            for at in range(weight.numel()):
                m, g, w = (float(x.view(-1)[at]) for x in (moment, slope, weight))
                mixed = 0.8 * m + 0.2 * g
                weight.view(-1)[at] = w - rates[i] * ((mixed > 0) - (mixed < 0)) - rates[i] * decay[i] * w
                moment.view(-1)[at] = 0.95 * m + 0.05 * g
        optimizer.step()
    for weight, expected in zip(fast, slow):
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


def test_defaults_follow_the_kind() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for kind, betas in (("adamw", (0.9, 0.98)), ("lion", (0.9, 0.99))):
        optimizer = build_optimizer(model, configuration.validate({"optim": {"kind": kind}}).optim)
        assert {group["betas"] for group in optimizer.param_groups} == {betas}
        given = configuration.validate({"optim": {"kind": kind, "betas": [0.5, 0.6]}}).optim
        assert build_optimizer(model, given).param_groups[0]["betas"] == (0.5, 0.6)
    assert build_optimizer(model, configuration.validate({}).optim).param_groups[0]["eps"] == 1e-6
    with pytest.raises(UserError, match="optim.eps: belongs to optim.kind: adamw"):
        configuration.validate({"optim": {"kind": "lion", "eps": 1e-8}})
    with pytest.raises(UserError, match=r"optim.betas.1: .*less than 1, got 1"):
        configuration.validate({"optim": {"betas": [0.9, 1.0]}})


LION = {"kind": "lion", "lr": 1e-4, "warmup": 16}


def test_taken_up_again_bit_for_bit_and_not_as_another_kind(tiny_tree: dict) -> None:
    tree = tiny_tree | {"samples": 64, "save_every": 32, "optim": LION}
    peace = train(configuration.validate(tree | {"name": "peace"}))
    folder = train(configuration.validate(tree | {"name": "cut"}))
    moments = load_file(cut(folder).with_name("step_00000002") / "optimizer.safetensors")
    assert {name.partition(".")[0] for name in moments} == {"exp_avg"} and any(x.any() for x in moments.values())
    with pytest.raises(UserError, match="holds the moments of lion, and optim.kind is adamw; resume with optim.kind=l"):
        train(configuration.validate(tree | {"name": "cut", "optim": {}}), resume=True)
    train(configuration.validate(tree | {"name": "cut"}), resume=True)
    same_bits(peace, folder)


ENGINES = [{"kind": "fsdp"}, *({"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2, 3))]


def _each(tree: dict, rank: int, world: int) -> list[tuple[Path, Path]]:
    trees = [
        tree | {"out": tree["out"].replace("{name}", f"{number}/{{name}}"), "engine": each}
        for number, each in enumerate(ENGINES)
    ]
    return [whole_and_cut(each, rank, world) for each in trees]


def test_two_ranks_resume_bit_for_bit_where_it_is_divided(tiny_tree: dict) -> None:
    """With groups for layers, which ZeRO shards one by one; beside the same run in one process."""
    tree = tiny_tree | {"samples": 64, "save_every": 32, "optim": LION | {"layer_decay": 0.5}}
    alone = train(configuration.validate(tree | {"name": "alone"}))
    for peace, again in run_ranks(partial(_each, tree), 2, timeout_s=120)[0]:
        same_bits(peace, again)
        # A sign of a rounded 0 may fall either way, so a few weights part by a step or two.
        want, got = (load_file(one / "checkpoints/step_00000004/model.safetensors") for one in (alone, peace))
        apart = torch.cat([(value - got[name]).abs().flatten() for name, value in want.items()])
        assert apart.max() <= 8e-4 and (apart > 1e-6).float().mean() < 0.01
