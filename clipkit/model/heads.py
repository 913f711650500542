"""Layers on top of the towers, as a spec names them under `heads`."""

from __future__ import annotations

import torch
from torch import nn

from clipkit.model.spec import Spec
from clipkit.model.towers import RootHead


def build_heads(spec: Spec, image_head: nn.Module) -> nn.ModuleDict:
    """`image`, `text`: linear d → d, the identity at first; `tags`: f or d → one logit a word. `image_head` tells f."""
    heads = spec.get("heads", {})
    width = spec["embed_dim"]
    out = nn.ModuleDict()
    for name in ("image", "text"):
        if name in heads:
            projection = out[name] = nn.Linear(width, width, bias=False)
            with torch.no_grad():
                projection.weight.copy_(torch.eye(width))
    if "tags" in heads:
        read = width if heads["tags"]["on"] == "embedding" else _features(image_head, width)
        out["tags"] = nn.Linear(read, len(heads["tags"]["words"]))
    return out


def _features(image_head: nn.Module, width: int) -> int:
    """What the image tower gives; towers that project themselves give embeddings."""
    linear = image_head.linear if isinstance(image_head, RootHead) else image_head
    return linear.in_features if isinstance(linear, nn.Linear) else width
