"""The objective: a weighted sum of small pure terms over global tables (`Embeddings.world()`)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clipkit.model.embeddings import Embeddings
from clipkit.registry import TERMS

__all__ = ["TERMS", "objective"]


def objective(
    z: Embeddings, terms: dict[str, dict[str, Any]]
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Σ weight · term over `terms` (name → settings, `weight` default 1), and each term unweighted, without gradient.

    `z` holds the global tables: pass `z.world()`. Raises UserError for a term that does not exist.
    """
    values = {
        name: TERMS.entry(name).target(z, **{key: value for key, value in settings.items() if key != "weight"})
        for name, settings in terms.items()
    }
    total = torch.stack([settings.get("weight", 1.0) * values[name] for name, settings in terms.items()]).sum()
    return total, {name: value.detach() for name, value in values.items()}
