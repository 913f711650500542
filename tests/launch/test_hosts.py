"""launch/torchrun.sh and launch/deepspeed.sh, as they are, across two hosts; and a run that loses one of its nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from clipkit.config import Config
from clipkit.data.build import write_shards
from clipkit.training.loop import train
from tests.launch.cluster import free_ports
from tests.launch.hosts import ROOT, Hosts, available, environment, hosts
from tests.training.conftest import degla_tree, tiny_samples
from tests.training.runs import losses, samples

pytestmark = pytest.mark.slow
NAMES = ("clipkit-h1", "clipkit-h2")
LONG = 16 * 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Hosts]:
    if not available(folder / "try"):
        pytest.skip("needs root, and permission for network namespaces")
    with hosts(folder / "two", *NAMES) as running:
        yield running


@pytest.fixture(scope="module")
def tree(folder: Path) -> dict:
    """The config of a small DeGLA run."""
    write_shards(tiny_samples(48), folder / "shards", per_shard=20, name="tiny", progress=False)
    return degla_tree(f"{folder}/shards/tiny-*.tar", folder) | {"engine": {"timeout_s": 180}}


@pytest.fixture(scope="module")
def alone(tree: dict) -> Path:
    """The run folder of one process."""
    return train(Config.model_validate(tree | {"name": "alone"}))


def written(tree: dict, folder: Path, name: str, **more: object) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree | {"name": name} | more))
    return str(path)


def ended(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said


def same(run: Path, alone: Path) -> None:
    assert samples(run) == samples(alone)
    assert losses(run) == pytest.approx(losses(alone), abs=1e-5)


def test_torchrun_on_two_hosts(two: Hosts, tree: dict, alone: Path, folder: Path):
    config, before = written(tree, folder, "torchrun"), two.received(NAMES[0])
    meet = {"NNODES": "2", "NPROC": "1", "MASTER_ADDR": NAMES[0], "JOIN_S": "400"}
    ended(*(two.start(name, ["bash", "launch/torchrun.sh", config], **meet) for name in NAMES))
    same(folder / "runs/torchrun", alone)
    assert two.received(NAMES[0]) - before > 20 * 100_000  # at least each step's gradient


@pytest.mark.parametrize("ssh", [True, False], ids=["pdsh", "no_ssh"])
def test_deepspeeds_hostfile_on_two_hosts(two: Hosts, tree: dict, alone: Path, folder: Path, ssh: bool):
    """From one host through (stand-ins for) ssh and pdsh, and started on each."""
    name = "pdsh" if ssh else "no_ssh"
    config, before = written(tree, folder, name), two.received(NAMES[1])
    (folder / "hostfile").write_text("".join(f"{host} slots=1\n" for host in NAMES))
    words = ["bash", "launch/deepspeed.sh", "-H", str(folder / "hostfile"), config, "engine.zero_stage=2"]
    if ssh:
        ended(two.start(NAMES[0], words))
    else:
        numbered = [{"NODE_RANK": str(rank), "MASTER_ADDR": NAMES[0]} for rank in range(2)]
        ended(*(two.start(host, words, **one) for host, one in zip(NAMES, numbered)))
    same(folder / f"runs/{name}", alone)
    assert two.received(NAMES[1]) - before > 20 * 50_000


def wait_for(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    log, limit = run / "samples.jsonl", time.monotonic() + 400
    while (log.read_text().count("\n") if log.is_file() else 0) < steps:
        assert time.monotonic() < limit and process.poll() is None, process.communicate(timeout=10)[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def long_alone(tree: dict) -> Path:
    return train(Config.model_validate(tree | {"name": "long_alone", "samples": LONG}))


SHRINKING = {"NNODES": "1:2", "NPROC": "1", "JOIN_S": "400", "LAST_CALL_S": "3"}


def test_a_host_that_is_lost(two: Hosts, tree: dict, long_alone: Path, folder: Path):
    """The other goes on by itself, from the last checkpoint, with the same global batches."""
    config, run = written(tree, folder, "lost", samples=LONG, save_every=16 * 20), folder / "runs/lost"
    meet = SHRINKING | {"MASTER_ADDR": NAMES[0]}
    left, lost = (two.start(name, ["bash", "launch/torchrun.sh", config], **meet) for name in NAMES)
    wait_for(run, 45, left)
    two.lose(NAMES[1])
    lost.communicate(timeout=60)
    ended(left)
    same(run, long_alone)
    assert len(list((run / "checkpoints/step_00000200").glob("rng_*.safetensors"))) == 1


def test_a_node_that_is_lost_on_one_machine(tree: dict, long_alone: Path, folder: Path):
    """The same with two agents beside each other, where namespaces are not permitted."""
    if available(folder / "again"):
        pytest.skip("hosts of their own show it here")
    config, run = written(tree, folder, "agents", samples=LONG, save_every=16 * 20), folder / "runs/agents"
    port = str(free_ports(1)[0])
    meet = environment(folder) | SHRINKING | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    left, lost = (
        subprocess.Popen(
            ["bash", "launch/torchrun.sh", config],
            env=meet | {"NODE_RANK": str(rank)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    )
    wait_for(run, 45, left)
    for process in [*psutil.Process(lost.pid).children(recursive=True), lost]:
        os.kill(process.pid, signal.SIGKILL)
    lost.communicate(timeout=60)
    ended(left)
    same(run, long_alone)
