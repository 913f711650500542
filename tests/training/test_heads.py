"""Methods with heads, tags and classes: every parameter gets a gradient, a run taken up again is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clipkit
from clipkit import config as configuration
from clipkit.config import Config
from clipkit.objective import Objective
from clipkit.training.loop import train
from tests.training.conftest import degla_tree
from tests.training.runs import finish, first_batch, launch, losses, train_ranks, weights

METHODS = ("hq_clip", "catlip", "spurious", "supcon")


def tree_of(method: str, shards: str, tags: str, folder: Path) -> dict[str, Any]:
    """A method on tiny towers: image tower as they have it, heads, locks and terms as its config has them."""
    config, tree = configuration.load(method), degla_tree(shards, folder)
    heads = config.model.heads.model_dump()
    data = tree["data"] | {name: getattr(config.data, name) for name in ("negatives", "positives", "caption", "labels")}
    if config.data.tags:
        data["tags"] = heads["tags"]["vocabulary"] = tags
    locks = {"lock_image": config.model.lock_image, "lock_text": config.model.lock_text, "heads": heads}
    tree |= {"objective": config.objective, "teacher": {"kind": "none"}, "name": method, "data": data}
    return tree | {"model": tree["model"] | locks}


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_that_learns_gets_a_gradient(method: str, tiny_shards: str, tiny_tags: str, tmp_path: Path):
    """What DDP waits for, also behind embeddings that no term asks for."""
    config, model, batch = first_batch(tree_of(method, tiny_shards, tiny_tags, tmp_path))
    total, values = Objective(config.objective)(model(batch).world())
    total.backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in learning.items() if p.grad is None]
    assert all(value != 0 for value in values.values()), values
    moved = {name.partition(".")[0] for name, p in learning.items() if p.grad is not None and p.grad.any()}
    assert (
        moved
        == {
            "hq_clip": {"image_tower", "text_tower", "heads", "log_scale"},
            "catlip": {"image_tower", "heads"},
            "spurious": {"heads", "log_scale"},
            "supcon": {"image_tower", "text_tower", "log_scale"},
        }[method]
    )


def test_a_run_taken_up_again_keeps_its_heads(tiny_shards: str, tiny_tags: str, tmp_path: Path):
    """Cut off after its first checkpoint: the same bits at the end; the run alone tells what its head's words are."""
    tree = tree_of("hq_clip", tiny_shards, tiny_tags, tmp_path) | {"samples": 64, "save_every": 32}
    tree["teacher"] = {"kind": "ema"}
    peace = train(Config.model_validate(tree | {"name": "peace"}))
    folder = train(Config.model_validate(tree | {"name": "cut"}))
    first, last = sorted((folder / "checkpoints").glob("step_*"))
    shutil.rmtree(last)
    train(Config.model_validate(tree | {"name": "cut"}), resume=True)
    for name in ("model", "optimizer", "teacher"):
        expected, got = (load_file(run / "checkpoints" / last.name / f"{name}.safetensors") for run in (peace, folder))
        assert expected.keys() == got.keys() and any("heads.tags" in key for key in got) == (name != "teacher")
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), name
    assert losses(folder) == losses(peace)
    model = clipkit.load(folder)
    assert model.tag_words == Path(tiny_tags).read_text().split() and not torch.equal(
        model.heads["tags"].weight, load_file(first / "model.safetensors")["heads.tags.weight"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one(method: str, tiny_shards: str, tiny_tags: str, tmp_path: Path):
    """DDP, ZeRO-1 and ZeRO-2, whole and in parts: losses and weights of one process."""
    tree = tree_of(method, tiny_shards, tiny_tags, tmp_path) | {"samples": 128}
    finish(launch(tree | {"name": "alone"}, tmp_path / "alone.yaml"))
    alone = tmp_path / "runs" / "alone"
    for name, engine in (
        ("ddp", {"kind": "ddp"}),
        ("ddp_parts", {"kind": "ddp", "accumulate": 2}),
        ("zero1", {"kind": "deepspeed", "zero_stage": 1}),
        ("zero2_parts", {"kind": "deepspeed", "zero_stage": 2, "accumulate": 2}),
    ):
        several = tree | {"name": name, "engine": engine | {"timeout_s": 60}}
        train_ranks(several, tmp_path / f"{name}.yaml")
        folder = tmp_path / "runs" / name
        assert losses(folder) == pytest.approx(losses(alone), abs=1e-5), name
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(row["grad_norm"] > 0 for row in rows)
        for key, value in weights(alone).items():
            torch.testing.assert_close(weights(folder)[key], value, atol=2e-3, rtol=0, msg=f"{name} {key}")
