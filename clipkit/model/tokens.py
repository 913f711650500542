"""What lies below a pooled embedding: a picture's patches and a text's words, from towers of every kind that has them.

Axes: n pictures or texts, p patches, t places of a text, f trunk features, c channels, d embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.layers.attention_pool2d import AttentionPool2d
from torch import Tensor, nn

from clipkit.errors import UserError
from clipkit.model.towers import ConvTower, TimmTower


def check_tokens(image: nn.Module, text: nn.Module) -> None:
    """Raises UserError where the towers do not give patches and words."""
    if not _gives_patches(image):
        raise UserError(
            f"model: its image tower ({_kind(image)}) gives no patches, which a local loss needs; use an open_clip "
            "ViT, model.image.conv, or a timm network that averages a map (n c h w) or tokens (n t c)"
        )
    if not _gives_words(text):
        raise UserError(
            f"model: its text tower ({_kind(text)}) gives no words, which a local loss needs; use one of open_clip's "
            "transformers that pool at the end of the text"
        )


def _gives_patches(tower: nn.Module) -> bool:
    if isinstance(tower, VisionTransformer):
        return tower.attn_pool is None and tower.pool_type in ("tok", "avg")
    if isinstance(tower, TimmTower) and not isinstance(tower.pool, AttentionPool2d):
        return _gives_cells(tower.trunk)
    return isinstance(tower, TimmTower | ConvTower)


def _gives_cells(trunk: Any) -> bool:
    """Whether `_cells` is right: channels come first, only patches are averaged, no statistics behind the pooling."""
    norms = [name for name, x in trunk.named_modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    return (
        getattr(trunk, "output_fmt", "NCHW") == "NCHW"
        and not getattr(trunk, "pool_include_prefix", False)
        and not any("head" in name for name in norms)
    )


def _gives_words(tower: nn.Module) -> bool:
    # Under other poolings nothing says which places hold the text and which frame it.
    return isinstance(tower, TextTransformer) and tower.pool_type in ("argmax", "eos") and tower.cls_emb is None


def _kind(tower: Any) -> str:
    return type(getattr(tower, "trunk", tower)).__name__


def with_patches(tower: Any, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1+p f"]:
    """The tower's features and, behind them, those of each patch, through whatever follows the pooling.

    The patches of attention pooling are its outputs at all places of the map, as those of a ViT's last block are.
    """
    if isinstance(tower, VisionTransformer):
        pooled, patches = _with_tokens(tower, pixels)
        if tower.final_ln_after_pool:
            patches = tower.ln_post(patches)
        return _behind(pooled, patches if tower.proj is None else patches @ tower.proj)
    if isinstance(tower.pool, AttentionPool2d):
        return _places(tower.pool, tower.trunk(pixels))
    if isinstance(tower, TimmTower):
        below = tower.trunk.forward_features(pixels)
        return _behind(tower.trunk.forward_head(below), _cells(tower.trunk, below))
    below = tower.trunk(pixels)
    return _behind(tower.pool(below), below.flatten(2).mT)


def with_words(tower: Any, tokens: Int64[Tensor, "n t"]) -> Float[Tensor, "n 1+t d"]:
    """The text's embedding and, behind it, that of each token, in the same projection; none of unit length."""
    pooled, words = _with_tokens(tower, tokens)
    if isinstance(tower.text_projection, nn.Linear):
        words = tower.text_projection(words)
    elif tower.text_projection is not None:
        words = words @ tower.text_projection
    return _behind(pooled, words)


def spoken(tower: Any, tokens: Int64[Tensor, "*n t"]) -> Bool[Tensor, "*n t"]:
    """Which places hold the text and its end, without its beginning and padding; nowhere in a text of zeros."""
    end = tokens if tower.pool_type == "argmax" else (tokens == tower.eos_id).long()
    place = torch.arange(tokens.shape[-1], device=tokens.device)
    return (place > 0) & (place <= end.argmax(-1, keepdim=True))


def _with_tokens(tower: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    tower.output_tokens = True
    try:
        return tower(x)
    finally:
        tower.output_tokens = False


def _behind(pooled: Float[Tensor, "n f"], tokens: Float[Tensor, "n p f"]) -> Float[Tensor, "n 1+p f"]:
    return torch.cat([pooled[:, None], tokens], 1)


def _places(pool: AttentionPool2d, below: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1+p f"]:
    """What attention pooling computes at the place of the query, which is all it gives, and at every other."""
    kept: list[Any] = []
    handle = pool.proj.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        AttentionPool2d.forward(pool, below)  # clipkit's own computes the one place only
    finally:
        handle.remove()
    return kept[0]


def _cells(trunk: Any, below: Tensor) -> Float[Tensor, "n p f"]:
    """Each cell of the map (n c h w), or each token (n t c), pooled as if it were the whole picture."""
    if below.ndim == 4:
        cells = below.flatten(2).mT[..., None, None]  # n p c 1 1
    else:
        prefix = getattr(trunk, "num_prefix_tokens", 0)
        cells = F.pad(below[:, prefix:, None], (0, 0, prefix, 0))  # n p prefix+1 c
    return trunk.forward_head(cells.flatten(0, 1)).unflatten(0, cells.shape[:2])
