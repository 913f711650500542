"""One rank raises: the others end within seconds, though engine.timeout_s is far away, and the reason comes first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from clipkit import config as configuration
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.data.build import write_shards
from clipkit.data.mixture import open_data
from clipkit.errors import PeerFailed
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from tests.launch.cluster import free_ports
from tests.ranks import RankError, run_ranks
from tests.training.conftest import tiny_samples
from tests.training.planted import EMBED

LAUNCH = Path(__file__).parents[2] / "launch"


def _failing(tree: dict, failing: int, stuck: bool, rank: int, world: int) -> tuple[type, str]:
    """What the training raises at this rank, when `failing` raises in its third step and the others perhaps hang."""
    steps = 0

    def embed(engine: Engine, batch: Batch) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and rank == failing:
            raise MemoryError("planted")
        while steps == 3 and stuck:  # as in a collective of NCCL, which no closed connection ends
            time.sleep(0.1)
        return EMBED(engine, batch)

    Engine.embed = embed
    with pytest.raises(Exception) as caught:
        train(Config.model_validate(tree))
    dist.destroy_process_group()  # as a process that ends does
    return caught.type, str(caught.value)


@pytest.mark.parametrize("failing", [0, 1])
def test_the_others_end_with_the_first_to_fail(tiny_tree: dict, failing: int) -> None:
    """Rank 0, through which all talk, waits until the others know."""
    found = run_ranks(partial(_failing, tiny_tree, failing, False), 2, timeout_s=60)
    assert found[failing] == (MemoryError, "planted")
    kind, said = found[1 - failing]
    assert kind is PeerFailed
    assert said.startswith(f"rank {1 - failing} ends because rank {failing} failed: MemoryError: planted; here: ")


def test_one_that_does_not_come_out_is_ended(tiny_tree: dict) -> None:
    with pytest.raises(RankError, match="rank 0 ended without a word"):
        run_ranks(partial(_failing, tiny_tree, 1, True), 2, timeout_s=60)


def _hanging(tree: dict, rank: int, world: int) -> str:
    def embed(engine: Engine, batch: Batch) -> Any:
        time.sleep(600 * rank)
        return EMBED(engine, batch)

    Engine.embed = embed
    dist.destroy_process_group()  # the tests' own, which has another timeout
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tree.pop("port"))}
    with pytest.raises(Exception) as caught:
        train(Config.model_validate(tree))
    dist.destroy_process_group()
    return str(caught.value)


@pytest.mark.slow
def test_a_collective_that_waits_too_long_ends_all(tiny_tree: dict) -> None:
    """Rank 1 hangs: rank 0 ends after engine.timeout_s, says so, and takes rank 1 along."""
    tree = tiny_tree | {"engine": {"timeout_s": 10}, "port": free_ports(1)[0]}
    with pytest.raises(RankError, match="rank 1 ended without a word"):
        run_ranks(partial(_hanging, tree), 2, timeout_s=60)


def planted_data(tree: dict, folder: Path) -> str:
    """Shards of which rank 1 reads a broken picture in the sixth step; its key."""
    samples = tiny_samples(160)
    tree["data"] = tree["data"] | {"train": [str(folder / "broken-*.tar")]}
    write_shards(samples, folder, per_shard=40, name="broken", progress=False)
    index, plan = open_data(configuration.validate(tree))
    bad = int(plan.rows(5)[0][8])
    key = index.where(bad)
    for file in folder.glob("broken-*.tar*"):
        file.unlink()
    samples[bad].image = b"no picture"
    write_shards(samples, folder, per_shard=40, name="broken", progress=False)
    return key


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local.sh", "deepspeed.sh"])
def test_the_reason_is_the_first_that_is_said(tiny_tree: dict, tmp_path: Path, launcher: str) -> None:
    """A broken picture among the data of the second rank, under torchrun and under DeepSpeed's launcher."""
    key = planted_data(tiny_tree, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_tree))
    command = ["bash", str(LAUNCH / launcher), "-n", "2", str(tmp_path / "run.yaml")]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_ports(1)[0])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    told = [line for line in lines if line.startswith("rank ")]
    assert done.returncode == 2, done.stderr
    assert told[0].startswith("rank 1: ") and key.partition("/")[2] in told[0], told
    assert told[1].startswith("rank 0 ends because rank 1 failed: ") and len(told) == 2
    assert "Traceback" not in done.stderr
