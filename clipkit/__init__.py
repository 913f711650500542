"""clipkit: train and judge CLIP-style dual encoders. Importing it imports no torch; names are fetched on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit import data, objective
    from clipkit.config import Config
    from clipkit.evaluation.run import evaluate
    from clipkit.evaluation.zeroshot import classify as zeroshot
    from clipkit.model.embeddings import Embeddings
    from clipkit.model.load import load
    from clipkit.training.loop import train

__version__ = "0.1.0"
__all__ = ["Config", "Embeddings", "data", "evaluate", "load", "objective", "train", "zeroshot"]

_HOMES = {
    "Config": ("clipkit.config", "Config"),
    "Embeddings": ("clipkit.model.embeddings", "Embeddings"),
    "data": ("clipkit.data", ""),
    "evaluate": ("clipkit.evaluation.run", "evaluate"),
    "load": ("clipkit.model.load", "load"),
    "objective": ("clipkit.objective", ""),
    "train": ("clipkit.training.loop", "train"),
    "zeroshot": ("clipkit.evaluation.zeroshot", "classify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    home = importlib.import_module(module)
    value = getattr(home, attribute) if attribute else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
