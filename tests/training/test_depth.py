"""Layer-wise decay: which parameter lies how deep, and that every group then learns at its own rate."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clipkit import config as configuration
from clipkit.errors import UserError
from clipkit.model.dual_encoder import build
from clipkit.training.depth import depths, learning_depths
from clipkit.training.loop import train
from clipkit.training.optim import build_optimizer, set_learning_rate

TIMM = {"timm": "vit_tiny_patch16_224", "size": 16, "pool": "avg"}
TIMM |= {"cfg": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}}
RESNET = {"timm": "resnet18", "cfg": {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}, "size": 32, "pool": "avg"}
MODIFIED = {"cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}, "size": 32}


def model_of(tree: dict, image: dict[str, Any] | None = None, **more: object) -> nn.Module:
    tree = tree | {"model": tree["model"] | ({"image": image} if image else {}) | more}
    return build(configuration.Config.model_validate(tree).model)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (None, {"conv1.weight": 2, "positional_embedding": 2, "transformer.resblocks.0.ln_1.bias": 1, "proj": 0}),
        (TIMM, {"trunk.patch_embed.proj.weight": 4, "trunk.pos_embed": 4, "trunk.blocks.0.norm1.weight": 3}),
        (TIMM, {"trunk.blocks.2.mlp.fc1.weight": 1, "trunk.fc_norm.weight": 0}),
        (RESNET, {"trunk.conv1.weight": 5, "trunk.layer1.0.bn1.bias": 4, "trunk.layer4.0.conv1.weight": 1}),
        (MODIFIED, {"conv3.weight": 5, "bn1.bias": 5, "layer4.0.conv1.weight": 1, "attnpool.q_proj.weight": 0}),
        ({"conv": [[8, 2], [16, 2]], "size": 16}, {"trunk.0.weight": 2, "trunk.1.bias": 2, "trunk.3.weight": 1}),
        ({"conv": [[8, 2], [16, 2]], "size": 16, "pool": "attention"}, {"pool.proj.weight": 0}),
    ],
)
def test_every_kind_of_tower_is_told_from_the_embeddings_up(tiny_tree: dict, image: dict, expected: dict) -> None:
    model = model_of(tiny_tree, image)
    found = learning_depths(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert {name: found[f"image_tower.{name}"] for name in expected} == expected
    text = (
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.mlp.c_fc.weight",
        "ln_final.bias",
    )
    assert [found[f"text_tower.{name}"] for name in text] == [2, 2, 1, 0]
    assert not any(depth for name, depth in found.items() if not name.startswith(("image_tower", "text_tower")))


def test_the_norm_behind_the_last_block_goes_with_it() -> None:
    vit = {"stem": r"^pos_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}
    names = ("norm.weight", "blocks.0.x", "pos_embed", "head.weight", "blocks.10.x", "blocks.2.x")
    assert depths(names, vit) == dict(zip(names, (1, 3, 4, 0, 1, 2)))


def test_an_adapter_counts_its_blocks(tiny_tree: dict) -> None:
    found = learning_depths(model_of(tiny_tree, text={"features": 8, "layers": 3}))
    assert [found[f"text_tower.blocks.{n}.1.weight"] for n in range(3)] == [3, 2, 1]
    assert found["text_tower.linear.weight"] == 0


class Alien(nn.Linear):
    """A tower like no other."""


def test_a_tower_whose_layers_cannot_be_told_is_refused_where_it_learns(tiny_tree: dict) -> None:
    model: Any = model_of(tiny_tree)
    model.image_tower = Alien(3, 3)
    with pytest.raises(UserError, match=r"optim.layer_decay: which layer is which cannot be told of Alien"):
        learning_depths(model)
    model.image_tower.requires_grad_(False)
    assert not any(name.startswith("image_tower") for name in learning_depths(model))


def test_every_group_learns_at_its_own_rate(tiny_tree: dict) -> None:
    model = model_of(tiny_tree, TIMM)
    config = configuration.validate(tiny_tree | {"optim": {"layer_decay": 0.5, "weight_decay": 0.3}}).optim
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.8)
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == set(names.values())
    assert rates["image_tower.trunk.pos_embed"] == (0.05, 0.3)
    assert rates["image_tower.trunk.blocks.2.norm1.bias"] == (0.4, 0.0)
    assert rates["text_tower.token_embedding.weight"] == (0.2, 0.3)
    assert rates["log_scale"] == (0.8, 0.0) and rates["image_head.weight"] == (0.8, 0.3)
    with pytest.raises(UserError, match="optim.layer_decay"):
        configuration.validate({"optim": {"layer_decay": 1.5}})


def test_taken_up_again_bit_for_bit_and_with_other_groups(tiny_tree: dict) -> None:
    tree = tiny_tree | {"samples": 64, "save_every": 32, "optim": {"lr": 1e-3, "layer_decay": 0.5, "warmup": 16}}
    peace = train(configuration.validate(tree | {"name": "peace"}))
    folder = train(configuration.validate(tree | {"name": "cut"}))
    last = folder / "checkpoints/step_00000004"
    for decay, same in ((0.5, True), (1.0, False)):
        shutil.rmtree(last)
        again = tree | {"name": "cut", "optim": tree["optim"] | {"layer_decay": decay}}
        train(configuration.validate(again), resume=True)
        for file in ("model.safetensors", "optimizer.safetensors"):
            want, got = load_file(peace / "checkpoints" / last.name / file), load_file(last / file)
            assert want.keys() == got.keys()
            assert all(torch.equal(value, got[name]) for name, value in want.items()) == same
