"""Trainings with something planted in them: `plant` for those in one process, the module itself for torchrun.

python -m tests.training.planted CONFIG '{"steps": [3], "how": "loss", "rank": 1}' [--resume]
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from clipkit import cli
from clipkit import config as configuration
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.data.mixture import open_data
from clipkit.model.embeddings import Embeddings
from clipkit.training.engine import Engine

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


if __name__ == "__main__":
    file, planted, *flags = sys.argv[1:]
    kind: dict[str, Any] = json.loads(planted)
    Engine.embed = plant(configuration.load(file), **kind)
    sys.argv = ["clipkit", "train", file, *flags]
    cli.main()
