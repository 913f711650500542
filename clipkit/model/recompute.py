"""Blocks that keep only what enters them, and are computed again in the backward pass (arXiv 1604.06174)."""

from __future__ import annotations

from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn

from clipkit.errors import UserError
from clipkit.model.towers import TimmTower


def recompute_blocks(tower: nn.Module) -> None:
    """From now on the tower keeps only the inputs of its blocks; dropout draws the same both times.

    Raises UserError for towers that cannot, and for those with batch norms, which would count every batch twice.
    """
    where: Any = tower.trunk if isinstance(tower, TimmTower | TimmModel) else tower
    kind = type(where).__name__
    advice = "use checkpoint_activations: false with engine.accumulate, lock the tower, or take a transformer"
    if norms := [m for m in tower.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        raise UserError(
            f"engine.checkpoint_activations: {len(norms)} batch norms in a learning tower ({kind}) would count every "
            f"batch twice; {advice}"
        )
    able = isinstance(tower, TimmTower | TimmModel | TextTransformer | VisionTransformer)
    try:
        if able:
            where.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError):  # how timm says it
        able = False
    if not able:
        raise UserError(
            f"engine.checkpoint_activations: a learning tower ({kind}) cannot compute its layers again; {advice}"
        )
