"""Shards to batches: `Index` finds the pairs, `Plan` orders them, `Loader` makes batches of them (imported late)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.data.batch import Batch
    from clipkit.data.build import Sample, build_shards, write_shards
    from clipkit.data.check import check_shards, index_shards
    from clipkit.data.decode import Preprocess
    from clipkit.data.features import FeatureStore
    from clipkit.data.loader import Loader
    from clipkit.data.plan import Plan, SampleRef
    from clipkit.data.shards import Index, TarFolder, read_member
    from clipkit.data.sheet import show_shard
    from clipkit.data.tokenize import Tokenizer

_MODULES = {
    "batch": ("Batch",),
    "build": ("Sample", "build_shards", "write_shards"),
    "check": ("check_shards", "index_shards"),
    "decode": ("Preprocess",),
    "features": ("FeatureStore",),
    "loader": ("Loader",),
    "plan": ("Plan", "SampleRef"),
    "sheet": ("show_shard",),
    "shards": ("Index", "TarFolder", "read_member"),
    "tokenize": ("Tokenizer",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Batch",
    "FeatureStore",
    "Index",
    "Loader",
    "Plan",
    "Preprocess",
    "Sample",
    "SampleRef",
    "TarFolder",
    "Tokenizer",
    "build_shards",
    "check_shards",
    "index_shards",
    "read_member",
    "show_shard",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"clipkit.data.{_HOME[name]}"), name)
    raise AttributeError(f"module clipkit.data has no attribute {name}")
