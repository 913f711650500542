"""Invariant 8: every config trains two steps, on tiny towers and pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from clipkit import config as configuration
from clipkit.config import Config
from clipkit.training.loop import train
from tests.training.conftest import degla_tree

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_there_are_as_many_as_there_should_be():
    assert len(CONFIGS) == 34


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps(name: str, tiny_shards: str, tmp_path: Path):
    """Its objective, teacher, locks, scale and optimizer as they are; only data, towers and lengths shrink."""
    config = configuration.load(name)
    small = degla_tree(tiny_shards, tmp_path)
    tree = config.model_dump(mode="json") | {
        "out": str(tmp_path / name),
        "batch_size": 16,
        "samples": 32,
        "log_every": 1,
        "evaluate_every": 0,
        "data": config.data.model_dump(mode="json") | {"train": small["data"]["train"], "workers": 0, "lanes": 4},
    }
    kept = {key: getattr(config.model, key) for key in ("lock_image", "lock_text", "scale", "scale_max", "bias")}
    tree["model"] = small["model"] | kept
    tree["optim"]["warmup"] = 0
    folder = train(Config.model_validate(tree))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        values = [row["loss"], row["grad_norm"], *(row[f"term/{term}"] for term in config.objective)]
        assert all(map(math.isfinite, values)) and row["grad_norm"] > 0
