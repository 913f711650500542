"""Layers on top of the towers, as a spec names them under `heads`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipkit.model.spec import Spec
from clipkit.model.towers import RootHead


def build_heads(spec: Spec, image_head: nn.Module) -> nn.ModuleDict:
    """`image`, `text`: linear d → d, the identity at first; `tags`: f or d → one logit a word; `aspects`: `Aspects`.

    `image_head` tells f.
    """
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
    if "aspects" in heads:
        out["aspects"] = Aspects(width, **heads["aspects"])
    return out


class Aspects(nn.Module):
    """Several projections of unit-length embeddings, with what a pair's temperature comes from. AMCL, arXiv 2310.05615.

    Two layers a projection, each tower's its own; one network of two layers for the temperatures of all.
    """

    def __init__(self, embed_dim: int, count: int, width: int):
        super().__init__()
        self.image, self.text = (nn.ModuleList(_two_layers(embed_dim, width) for _ in range(count)) for _ in range(2))
        self.temperature = _two_layers(width, width)

    def forward(self, embedding: Float[Tensor, "n d"], tower: str) -> Float[Tensor, "n h 2 a"]:
        """Of `tower`'s (image, text) embeddings: each projection at unit length, and what φ makes of it."""
        embedding = embedding.to(next(self.parameters()).dtype)
        seen = torch.stack([F.normalize(head(embedding).float(), dim=-1) for head in getattr(self, tower)], 1)
        return torch.stack([seen, self.temperature(seen.to(embedding.dtype)).float()], 2)


def _two_layers(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, outer))


def _features(image_head: nn.Module, width: int) -> int:
    """What the image tower gives; towers that project themselves give embeddings."""
    linear = image_head.linear if isinstance(image_head, RootHead) else image_head
    return linear.in_features if isinstance(linear, nn.Linear) else width
