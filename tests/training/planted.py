"""Trainings with something planted in them: `plant` for those in one process, `train_planted` for ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.data.mixture import open_data
from clipkit.model.embeddings import Embeddings
from clipkit.training.engine import Engine
from clipkit.training.loop import train

EMBED = Engine.embed


def plant(config: Config, steps: Collection[int], how: str, rank: int = 0) -> Callable[[Engine, Batch], Embeddings]:
    """An `Engine.embed` that at the 0-based `steps`, on one rank, gives NaN embeddings or a NaN gradient at them."""
    share = config.batch_size // int(os.environ.get("WORLD_SIZE", "1"))
    own = slice(rank * share, (rank + 1) * share)
    plan = open_data(config)[1]
    shares = {tuple(plan.rows(step)[0][own].tolist()) for step in steps}

    def embed(engine: Engine, batch: Batch) -> Embeddings:
        z = EMBED(engine, batch)
        if tuple(batch.id.tolist()) in shares:
            if how == "loss":
                return replace(z, text=z.text * math.nan)
            z.text.register_hook(lambda grad: grad * math.nan)
        return z

    return embed


def train_planted(tree: dict[str, Any], planted: dict[str, Any], rank: int, world: int) -> None:
    """On one of several ranks: the run that `tree` says, with that planted in it."""
    config = Config.model_validate(tree)
    Engine.embed = plant(config, **planted)
    train(config)
