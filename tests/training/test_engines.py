"""Engines that divide the model among ranks: really divided, resumed bit for bit, whole in every checkpoint."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import clipkit
from clipkit import config as configuration
from clipkit import distributed
from clipkit.model.dual_encoder import build
from clipkit.model.teacher import Teacher
from clipkit.training import zero
from clipkit.training.engine import Engine, engine_for
from clipkit.training.loop import train
from clipkit.training.optim import build_optimizer
from tests.ranks import run_ranks
from tests.training.runs import cut, losses, same_bits, weights, whole_and_cut

DIVIDED = [{"kind": "fsdp"}, {"kind": "deepspeed", "zero_stage": 3}]


def _divided(tree: dict, _rank: int, world: int) -> None:
    config = configuration.validate(tree)
    torch.manual_seed(0)
    model = build(config.model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    teacher = Teacher.of(model, config)
    engine = engine_for(config)
    engine.prepare(model, build_optimizer(model, config.optim))
    engine.host(teacher)
    drawn = torch.get_rng_state()
    for found in (engine.weights(), engine.whole_model().state_dict(), teacher.state()):
        assert found.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in found.items())
    assert torch.equal(torch.get_rng_state(), drawn)
    whole = sum(x.numel() for x in before.values())
    for held in (engine.bare, teacher.model):
        here = sum(distributed.part(p.detach()).numel() for p in held.parameters())
        assert here < 1.1 * whole / world


def test_a_rank_holds_its_part_only(tiny_tree: dict) -> None:
    """Of student and teacher under FSDP; and what is gathered is what there was, without a random number drawn."""
    run_ranks(partial(_divided, tiny_tree | {"engine": {"kind": "fsdp"}}), 2, timeout_s=60)


def _runs(tree: dict, begun: Path, rank: int, world: int) -> tuple[Path, Path, Path]:
    zero.RESIDENT = 0  # everything here would be small enough to stay
    peace, again = whole_and_cut(tree, rank, world)
    return peace, again, train(configuration.validate(tree | {"name": begun.name}), resume=True)


@pytest.mark.parametrize("engine", DIVIDED, ids=lambda engine: engine["kind"])
def test_taken_up_again_and_moved(engine: dict, tiny_tree: dict, tmp_path: Path) -> None:
    """Bit for bit on the same ranks, and from one process to them and back with its losses."""
    tree = tiny_tree | {"samples": 96, "save_every": 48, "keep": 9, "optim": {"lr": 1e-3, "eps": 1e-3}}
    alone = train(configuration.validate(tree | {"name": "alone"}))
    begun = Path(shutil.copytree(alone, alone.with_name("begun")))
    cut(begun)
    several = tree | {"engine": engine | {"timeout_s": 60}}
    peace, again, begun = run_ranks(partial(_runs, several, begun), 2, timeout_s=120)[0]
    same_bits(peace, again)
    cut(again)
    train(configuration.validate(tree | {"name": again.name}), resume=True)
    text = ["a red wall"]
    for folder in (peace, begun, again):
        assert losses(folder) == pytest.approx(losses(alone), abs=1e-5), folder.name
        torch.testing.assert_close(clipkit.load(folder).embed_texts(text), clipkit.load(alone).embed_texts(text))


def _locked(tree: dict, _rank: int, _world: int) -> Path:
    return train(configuration.validate(tree))


def test_locked_towers_stay_whole(tiny_tree: dict) -> None:
    """Student and teacher share one pass through the tower, outside of what FSDP gathers."""
    tree = tiny_tree | {"samples": 48, "model": tiny_tree["model"] | {"lock_image": True, "heads": {"image": True}}}
    alone = train(configuration.validate(tree | {"name": "alone"}))
    folder = run_ranks(partial(_locked, tree | {"name": "fsdp", "engine": {"kind": "fsdp"}}), 2, timeout_s=60)[0]
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)


def test_scale_and_bias_are_read_outside_of_what_is_gathered(tiny_tree: dict) -> None:
    """SigLIP, whose loss begins behind the forward pass: its scalars have the gradients of one process.

    Also in parts, with blocks computed again, which are gathered once more for it.
    """
    tree = tiny_tree | {"samples": 64, "objective": {"siglip": {}}, "teacher": {}}
    tree["model"] = tiny_tree["model"] | {"bias": -10.0, "scale": 10.0}
    alone = train(configuration.validate(tree | {"name": "alone"}))
    more = {"accumulate": 2, "checkpoint_activations": True}
    engines = [engine | other for engine in DIVIDED for other in ({}, more)]
    for folder in run_ranks(partial(_one_after_another, tree, engines), 2, timeout_s=120)[0]:
        assert losses(folder) == pytest.approx(losses(alone), abs=1e-5), folder.name
        for name in ("log_scale", "bias"):
            torch.testing.assert_close(weights(folder)[name], weights(alone)[name], rtol=0, atol=1e-6)


def test_the_scale_stays_at_its_bound_in_masters_too(tiny_tree: dict) -> None:
    """At 1, where InfoNCE wants more, it is 1 after two steps: in what each engine keeps, moments and checkpoint."""
    tree = tiny_tree | {"samples": 32, "objective": {"infonce": {}}, "teacher": {}}
    tree["model"] = tiny_tree["model"] | {"scale": 1.0, "scale_max": 1.0}
    engines = [*DIVIDED, *({"kind": "deepspeed", "zero_stage": stage} for stage in (1, 2))]
    engines.append({"kind": "deepspeed", "zero_stage": 2, "precision": "bf16"})
    for folder in run_ranks(partial(_one_after_another, tree, engines), 2, timeout_s=300)[0]:
        assert weights(folder)["log_scale"].item() == 0.0, folder.name
        assert weights(folder, "optimizer")["exp_avg_sq.log_scale"].item() == 0.0, folder.name
    tree["model"]["scale_max"] = 2.0
    free = train(configuration.validate(tree | {"name": "free"}))
    assert weights(free)["log_scale"].item() > 1e-5


def _one_after_another(tree: dict, engines: list[dict], _rank: int, _world: int) -> list[Path]:
    """On a rank: the same run under each engine."""
    zero.RESIDENT = 0
    Engine.close = lambda _: distributed.barrier()  # type: ignore[method-assign]  # the group of ranks is the test's
    named = [tree | {"name": f"engine{number}", "engine": engine} for number, engine in enumerate(engines)]
    return [train(configuration.validate(each)) for each in named]


def _thrice(tree: dict, _rank: int, _world: int) -> None:
    dist.destroy_process_group()  # the test's
    for number, stage in enumerate((1, 1, 3)):
        each = {"name": f"run{number}", "engine": {"kind": "deepspeed", "zero_stage": stage}}
        train(configuration.validate(tree | each))


def test_deepspeed_trains_more_than_once_in_a_process(tiny_tree: dict) -> None:
    """As a sweep does: it remembers the process group of the first time."""
    run_ranks(partial(_thrice, tiny_tree | {"samples": 32}), 1, timeout_s=120)
