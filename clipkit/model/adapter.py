"""A text tower that reads the features of a language model, computed beforehand, instead of tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

EXPANSION = 2


class FeatureAdapter(nn.Module):
    """Stored features of texts [n f] → [n d]. LLM2CLIP, arXiv 2411.04997.

        u ← u + W2 gelu(W1 LN(u))     `layers` times, W1 to twice the width and W2 back;     then W LN(u)

    W2 begins at 0: at the start the adapter is the linear map of the normalised features.
    """

    def __init__(self, features: int, layers: int, embed_dim: int):
        super().__init__()
        self.features = features
        self.blocks = nn.ModuleList(_bottleneck(features) for _ in range(layers))
        self.norm, self.linear = nn.LayerNorm(features), nn.Linear(features, embed_dim)

    def forward(self, features: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        for block in self.blocks:
            features = features + block(features)
        return self.linear(self.norm(features))


def _bottleneck(width: int) -> nn.Sequential:
    narrow = nn.Linear(EXPANSION * width, width)
    nn.init.zeros_(narrow.weight)
    nn.init.zeros_(narrow.bias)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, EXPANSION * width), nn.GELU(), narrow)
