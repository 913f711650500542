"""launch/slurm.sh, as it is, on a real SLURM of two nodes (make test-cluster); skipped where that is not installed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from clipkit.data.build import write_shards
from tests.launch.cluster import Cluster, available, cluster
from tests.training.conftest import degla_tree, tiny_samples

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="needs SLURM (tests/install.sh), and root to start it"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "c") as running:
        yield running


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """The config of a small DeGLA run."""
    write_shards(tiny_samples(48), tmp_path / "shards", per_shard=20, name="tiny", progress=False)
    return degla_tree(f"{tmp_path}/shards/tiny-*.tar", tmp_path)


def submit(slurm: Cluster, folder: Path, *words: str, nodes: int = 2, array: str = "") -> str:
    """The number of a job of one rank a node, whose output goes to `folder`."""
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={folder}/%j.out", f"--chdir={ROOT}"]
    environment = {
        "PYTHON": sys.executable,
        "MASTER_ADDR": "127.0.0.1",  # the nodes' names are the cluster's alone
        "OMP_NUM_THREADS": "1",
        "CLIPKIT_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    command = ["sbatch", "--parsable", *options, *([f"--array={array}"] if array else []), "launch/slurm.sh", *words]
    return slurm.run(*command, **environment).strip()


def steps(folder: Path) -> int:
    """The last step in a run's log."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def weights(folder: Path) -> dict[str, Any]:
    return load_file(sorted(folder.glob("checkpoints/step_*/model.safetensors"))[-1])


def test_a_job_that_is_stopped_is_queued_again_and_loses_nothing(slurm: Cluster, tree: dict, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree | {"samples": 16 * 100}))
    whole = submit(slurm, tmp_path, str(config), f"out={tmp_path}/whole")
    stopped = submit(slurm, tmp_path, str(config), f"out={tmp_path}/stopped")
    limit = time.monotonic() + 400
    while steps(tmp_path / "stopped") < 20:
        assert time.monotonic() < limit, (tmp_path / f"{stopped}.out").read_text()[-2000:]
        time.sleep(0.05)
    slurm.run("scancel", "--signal=USR1", "--batch", stopped)
    assert slurm.wait(stopped, "PENDING")["Restarts"] == "1"
    assert 20 <= steps(tmp_path / "stopped") < 100
    time.sleep(5)  # the nodes forget the first start
    slurm.run("scontrol", "update", f"JobId={stopped}", "StartTime=now")  # SLURM would wait two minutes
    assert slurm.wait(stopped, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert slurm.wait(whole, "COMPLETED", "FAILED")["Restarts"] == "0"
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert (tmp_path / "whole/samples.jsonl").read_text() == (tmp_path / "stopped/samples.jsonl").read_text()


def test_an_array_is_a_sweep_and_a_cancelled_job_stays_away(slurm: Cluster, tree: dict, tmp_path: Path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree | {"samples": 32}))
    job = submit(slurm, tmp_path, str(config), "seed={array}", f"out={tmp_path}/{{seed}}", nodes=1, array="3,5")
    endless = submit(slurm, tmp_path, str(config), "samples=1_600_000", f"out={tmp_path}/endless", nodes=1)
    limit = time.monotonic() + 400
    while steps(tmp_path / "endless") < 2:
        assert time.monotonic() < limit, (tmp_path / f"{endless}.out").read_text()[-2000:]
        time.sleep(0.05)
    slurm.run("scancel", endless)
    for task in ("3", "5"):
        assert slurm.wait(f"{job}_{task}", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
        assert yaml.safe_load((tmp_path / task / "config.yaml").read_text())["seed"] == int(task)
    slurm.wait(endless, "CANCELLED")
    time.sleep(3)
    assert slurm.job(endless)["JobState"] == "CANCELLED" and os.listdir(tmp_path / "endless/checkpoints")
