"""Pictures moved against the model: within their bounds, against the captions, and without a trace elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import config as configuration
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.model.dual_encoder import DualEncoder
from clipkit.settings import AdversaryConfig
from clipkit.training.adversary import attacked
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from clipkit.training.optim import build_optimizer
from tests.ranks import run_ranks
from tests.training.runs import first_batch

ATTACK = AdversaryConfig(eps=3.0, steps=4)


@pytest.fixture
def tree(tiny_tree: dict) -> dict:
    """CLIP on moved pictures, with a text tower that drops."""
    tiny_tree["model"]["text"] |= {"dropout": 0.3}
    tiny_tree["data"] |= {"negatives": 0}
    return tiny_tree | {
        "objective": {"infonce": {}},
        "teacher": {"kind": "none"},
        "adversary": ATTACK.model_dump(),
        "samples": 48,
    }


def opened(tree: dict) -> tuple[DualEncoder, Batch]:
    _, model, batch = first_batch(tree)
    return model, batch


def losses(model: DualEncoder, batch: Batch, image: Tensor) -> Tensor:
    """One a picture, among all captions but others of its own group."""
    logits = model.scale * model.encode_image(image) @ model.encode_text(batch.text).T
    same = (batch.group[:, None] == batch.group) & ~torch.eye(len(batch), dtype=torch.bool)
    return F.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(batch)), reduction="none")


def test_pictures_move_uphill_within_their_bounds(tree: dict):
    model, batch = opened(tree)
    assert batch.image is not None
    batch.group[3] = batch.group[0]
    moved = attacked(model, batch, ATTACK)
    assert moved.image is not None and moved.image.dtype == torch.float32 and not moved.image.requires_grad
    change = moved.image - batch.image
    assert change.abs().max() == 3.0 and moved.image.min() >= 0 and moved.image.max() <= 255
    assert torch.equal(moved.text, batch.text) and batch.image.dtype == torch.uint8
    model.eval()
    with torch.no_grad():
        before, after = losses(model, batch, batch.image), losses(model, batch, moved.image)
    assert (after > before).all()
    extreme = replace(batch, image=torch.where(batch.image > 127, 255, 0).to(torch.uint8))
    held = attacked(model, extreme, ATTACK).image
    assert held is not None and held.min() == 0 and held.max() == 255


def test_a_step_is_the_sign_of_the_slope(tree: dict):
    """By hand, with everything in one graph; a bound of 0 leaves pictures as they are."""
    model, batch = opened(tree)
    assert batch.image is not None
    model.eval()
    pixels = batch.image.float().requires_grad_()
    losses(model, batch, pixels).sum().backward()
    assert pixels.grad is not None
    expected = (pixels.detach() + 2 * pixels.grad.sign()).clamp(0, 255)
    moved = attacked(model, batch, AdversaryConfig(eps=5.0, steps=1, step_size=2.0)).image
    assert moved is not None and (moved != expected).float().mean() < 1e-3  # slopes that are nearly 0 may round
    nowhere = attacked(model, batch, AdversaryConfig(eps=0.0)).image
    assert nowhere is not None and torch.equal(nowhere, batch.image.float())


@pytest.mark.parametrize("tower", ["transformer", "conv"])
def test_an_attack_leaves_no_trace(tree: dict, tower: str):
    """No gradient, no running statistic, no mode, and not one random number."""
    if tower == "conv":
        tree["model"] |= {"image": {"conv": [[8, 2], [16, 2]], "size": 16}}
    tree["model"] |= {"lock_text": True}
    model, batch = opened(tree)
    modes = [module.training for module in model.modules()]
    assert any(modes) and not all(modes)
    tensors, random = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    attacked(model, batch, ATTACK)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(x, tensors[name]) for name, x in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_parts_do_not_matter(tree: dict):
    model, batch = opened(tree)
    whole, parts = attacked(model, batch, ATTACK).image, attacked(model, batch, ATTACK, parts=4).image
    assert whole is not None and parts is not None and (whole != parts).float().mean() < 1e-3


@pytest.mark.parametrize("parts", [1, 2])
def test_both_towers_learn_in_bf16(tree: dict, parts: int):
    """Weights that the attack casts without gradient are not what the step learns through."""
    config = configuration.validate(tree | {"engine": {"precision": "bf16", "accumulate": parts}})
    model, batch = opened(tree)
    engine = Engine(config)
    engine.prepare(model, build_optimizer(model, config.optim))
    with engine.autocast():
        z = engine.embed(batch)
    engine.backward((z.image * z.text).sum())
    for name, parameter in model.named_parameters():
        if name != "log_scale":
            assert parameter.grad is not None and parameter.grad.any(), name


def trained(tree: dict) -> list[float]:
    """The losses of a run."""
    folder = train(Config.model_validate(tree))
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def on_a_rank(tree: dict, _rank: int, _world: int) -> list[list[float]]:
    """Whole, in parts and divided, in a process group that is not the runs' to close."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "close", lambda self: None)
        engines = [{"accumulate": 1}, {"accumulate": 2}, {"kind": "fsdp"}]
        return [trained(tree | {"name": f"ranks{number}", "engine": each}) for number, each in enumerate(engines)]


def test_ranks_equal_one_process(tree: dict, tmp_path: Path):
    """And what is learnt from moved pictures is something else."""
    tree["model"]["text"] |= {"dropout": 0.0}
    alone, plain = trained(tree | {"name": "alone"}), trained(tree | {"name": "plain", "adversary": {"eps": 0}})
    assert len(alone) == 3 and alone[0] > plain[0] + 0.01
    for found in run_ranks(partial(on_a_rank, tree), 2, timeout_s=120):
        assert [loss for run in found for loss in run] == pytest.approx(alone * 3, abs=2e-3)
    assert plain == trained(tree | {"name": "without", "adversary": {}})
