"""How far below the embedding each parameter lies, for layer-wise learning rates (BEiT, arXiv 2106.08254)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models._manipulate import group_with_matcher
from torch import nn

from clipkit.errors import UserError
from clipkit.model.adapter import FeatureAdapter
from clipkit.model.towers import ConvTower, TimmTower

Matcher = dict[str, Any] | Callable[[str], tuple[float, ...]]
"""From a tower's parameter names to its layers, from below, in timm's form; what is not matched lies above them all."""

TRANSFORMER = r"transformer\.resblocks\.(\d+)\."
MATCHERS: dict[type[nn.Module], Matcher] = {
    VisionTransformer: {
        "stem": r"(?:conv1|class_embedding|positional_embedding|ln_pre)(?:\.|$)",
        "blocks": TRANSFORMER,
    },
    ModifiedResNet: {"stem": r"(?:conv|bn)\d\.", "blocks": r"layer(\d+)\.(\d+)\."},
    TextTransformer: {"stem": r"(?:token_embedding|positional_embedding|cls_emb)(?:\.|$)", "blocks": TRANSFORMER},
    FeatureAdapter: {"blocks": r"blocks\.(\d+)\."},
    ConvTower: lambda name: (int(name.split(".")[1]) // 3 if name.startswith("trunk.") else math.inf,),
}
TOP = "above all layers"
"""Stands for the head among a tower's parameters: not every tower has one of its own."""


def depths(names: Iterable[str], matcher: Matcher) -> dict[str, int]:
    """The depth of a tower's parameters by name: heads and projections 0, the last layer 1, embeddings deepest.

    What timm counts to the last layer (its norm) lies at 1. A pure function of the names.
    """
    every: Any = ((name, None) for name in (*names, TOP))
    layers: Any = group_with_matcher(every, matcher, reverse=True)
    top = layers.pop(TOP)
    return {name: top - layer for name, layer in layers.items()}


def learning_depths(model: nn.Module) -> dict[str, int]:
    """The depth of every parameter of a dual encoder that learns; 0 for scale, bias and heads.

    Raises UserError for a learning tower whose layers cannot be told.
    """
    found = {name: 0 for name, p in model.named_parameters() if p.requires_grad}
    for tower in ("image_tower", "text_tower"):
        own = {f"{tower}.{name}": depth for name, depth in _tower_depths(getattr(model, tower)).items()}
        found |= {name: depth for name, depth in own.items() if name in found}
    return found


def _tower_depths(tower: Any) -> dict[str, int]:
    if not any(p.requires_grad for p in tower.parameters()):
        return {}
    names = [name for name, _ in tower.named_parameters()]
    if isinstance(tower, TimmTower | TimmModel):
        matcher = getattr(tower.trunk, "group_matcher", dict)()
        below = [name.removeprefix("trunk.") for name in names if name.startswith("trunk.")]
        found = dict.fromkeys(names, 0) | {f"trunk.{k}": depth for k, depth in depths(below, matcher).items()}
    else:
        found = depths(names, next((m for kind, m in MATCHERS.items() if isinstance(tower, kind)), {}))
    if not any(found.values()):
        kind = type(getattr(tower, "trunk", tower)).__name__
        raise UserError(
            f"optim.layer_decay: which layer is which cannot be told of {kind} (a learning tower); "
            "use layer_decay: 1.0, lock the tower, or take an open_clip transformer or a timm network"
        )
    return found
