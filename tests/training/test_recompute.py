"""Blocks computed again in the backward pass: the gradient of the plain run, dropout included, in less memory."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.errors import UserError
from clipkit.model import dual_encoder
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.objective import objective
from clipkit.training.accumulate import EmbeddingCache
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from clipkit.training.optim import build_optimizer
from tests.training.runs import first_batch

VIT = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16}
TIMM = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
DROPPING = {"proj_drop_rate": 0.2, "drop_path_rate": 0.5}
RESNET = {"timm": "resnet18", "cfg": {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}, "size": 32, "pool": "avg"}
IMAGES = {
    "open_clip": {"cfg": VIT, "size": 16},
    "timm": {"timm": "vit_tiny_patch16_224", "cfg": TIMM | DROPPING, "size": 16, "pool": "avg"},
}


def setting(tree: dict, image: str) -> tuple[configuration.Config, DualEncoder, Batch]:
    tree = tree | {"objective": {"infonce": {}, "igc": {}}, "teacher": {}}
    tree["model"] = tree["model"] | {"image": IMAGES[image]}
    tree["model"]["text"] = tree["model"]["text"] | {"layers": 3, "dropout": 0.3}
    return first_batch(tree)


def step(config: configuration.Config, model: DualEncoder, batch: Batch, parts: int) -> tuple[dict[str, Tensor], int]:
    """All gradients, and the bytes that the forward pass kept for the backward one."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        cache = EmbeddingCache(model, batch.split(parts)) if parts > 1 else None
        loss, _ = objective(cache.embeddings if cache else model(batch), config.objective)
    loss.backward()
    for number in range(parts if cache else 0):
        assert cache is not None
        cache.surrogate(number).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found, sum(kept.values())


@pytest.mark.parametrize("image", IMAGES)
def test_the_gradient_is_that_of_the_plain_run(tiny_tree: dict, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit with the same kernel of attention, which plain runs on CPUs choose for themselves."""
    config, model, batch = setting(tiny_tree, image)
    chosen, _ = step(config, model, batch, 1)
    monkeypatch.setattr(dual_encoder, "_attention", lambda _device: nullcontext())
    (plain, kept), (parts, _) = step(config, model, batch, 1), step(config, model, batch, 4)
    monkeypatch.undo()
    model.recompute()
    (again, less), (again_parts, _) = step(config, model, batch, 1), step(config, model, batch, 4)
    assert less < 0.6 * kept
    for expected, found in ((plain, again), (parts, again_parts)):
        assert expected.keys() == found.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    for name, grad in chosen.items():
        assert (again[name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def both(tree: dict, **engine: Any) -> list[list[float]]:
    """The losses of three steps plain, and with blocks computed again."""
    found = []
    for recompute in (False, True):
        settings = {"engine": engine | {"checkpoint_activations": recompute}, "name": f"{recompute}", "samples": 48}
        folder = train(configuration.validate(tree | settings))
        found.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert len(found[0]) == 3
    return found


def test_a_run_has_the_losses_of_the_plain_one(tiny_tree: dict) -> None:
    """With a teacher, which is a copy made before, and pictures moved against the model."""
    plain, again = both(tiny_tree | {"adversary": {"eps": 1.0}})
    assert again == pytest.approx(plain, abs=1e-4)


def test_bf16_is_cast_the_same_both_times(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit with the same kernel of attention."""
    monkeypatch.setattr(dual_encoder, "_attention", lambda _device: nullcontext())
    plain, again = both(tiny_tree, precision="bf16")
    assert again == plain


@pytest.mark.parametrize(
    ("image", "text", "problem"),
    [
        (
            {"conv": [[8, 2], [16, 2]], "size": 16},
            {},
            "2 batch norms in a learning tower .ConvTower. would count every",
        ),
        (RESNET, {}, "batch norms in a learning tower .ResNet. would count every"),
        (IMAGES["open_clip"], {"features": 8}, "a learning tower .FeatureAdapter. cannot compute its layers again"),
    ],
)
def test_towers_that_cannot_are_refused_where_they_learn(
    tiny_tree: dict, image: dict[str, Any], text: dict[str, Any], problem: str
) -> None:
    tree = tiny_tree | {"model": {"image": image, "text": text or tiny_tree["model"]["text"]}}
    tree["engine"] = {"checkpoint_activations": True}
    tree["data"] = tree["data"] | ({"text_features": "llm"} if text else {})
    config = configuration.validate(tree)
    model = build(config.model)
    with pytest.raises(UserError, match=problem):
        Engine(config).prepare(model, build_optimizer(model, config.optim))
    model.lock(image=not text, text=bool(text)).recompute()


def test_there_has_to_be_something_to_compute_again() -> None:
    tree = {"engine": {"checkpoint_activations": True}, "model": {"lock_image": True, "lock_text": True}}
    with pytest.raises(UserError, match="engine.checkpoint_activations: both towers are locked"):
        configuration.validate(tree)
