"""The torchrun of the launchers, with ranks that do nothing but end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import clipkit
from clipkit import agent
from clipkit.data.world.build import build_world
from tests.launch.cluster import free_ports

LAUNCH = Path(__file__).parents[2] / "launch"
ENDS = """
import os, pathlib, signal, sys, time
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[2])
(folder / f"begun_{rank}").touch()
if rank == "1" and sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if rank == "1" and sys.argv[1].isdigit():
    sys.exit(int(sys.argv[1]))
time.sleep(0 if sys.argv[1] == "well" else 60)
"""


def words(folder: Path, how: str) -> list[str]:
    (folder / "ends.py").write_text(ENDS)
    return ["--standalone", "--nproc-per-node=2", str(folder / "ends.py"), how, str(folder)]


@pytest.fixture
def unchanged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchrun takes the signals of its process, and counts on OMP_NUM_THREADS."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    taken = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    before = [signal.getsignal(number) for number in taken]
    yield
    for number, handler in zip(taken, before):
        signal.signal(number, handler)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("how", "status"), [("75", 75), ("2", 2), ("killed", 137)])
def test_a_rank_that_fails_gives_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, status: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["agent", *words(tmp_path, how)])
    with pytest.raises(SystemExit) as ended:
        agent.main()
    assert ended.value.code == status


@pytest.mark.usefixtures("unchanged")
def test_ranks_that_end_well_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["agent", *words(tmp_path, "well")])
    agent.main()


def test_an_agent_that_is_told_to_stop_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clipkit.agent", *words(tmp_path, "wait")]
    environment = os.environ | {"PYTHONPATH": str(Path(clipkit.__file__).parent.parent)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    limit = time.monotonic() + 60
    while not (tmp_path / "begun_1").exists() or not (tmp_path / "begun_0").exists():
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said


def test_what_all_ranks_find_wrong_is_said_once() -> None:
    """Before they have met: a misspelt setting."""
    command = ["bash", str(LAUNCH / "local.sh"), "-n", "3", "debug", "data.negativs=2"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("did you mean negatives") == 1, done.stderr


def test_a_round_after_nodes_came_or_went_is_no_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun counts failures only; each agent's ranks leave marks."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.delenv(agent.ROUNDS, raising=False)
    assert not agent.restarted() and not agent.restarted()
    monkeypatch.setenv(agent.ROUNDS, str(tmp_path))
    found = []
    for rank in ("0", "1", "0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        found.append(agent.restarted())
    assert found == [False, False, True, True]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.delenv(agent.ROUNDS)
    assert agent.restarted()


@pytest.mark.slow
def test_a_node_that_joins_takes_part(tmp_path: Path) -> None:
    """NNODES=1:2: the second agent comes when the run has begun; it goes on with both."""
    build_world(tmp_path / "data/world", pictures=200, eval_rows=2)
    settings = ["debug", "samples=24000", "save_every=640", "keep=2", "name=joined"]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NNODES": "1:2", "NPROC": "1"}
    environment |= {"RESTARTS": "0", "LAST_CALL_S": "2", "MASTER_PORT": str(free_ports(1)[0])}
    command = ["bash", str(LAUNCH / "torchrun.sh"), *settings]

    def node(name: str) -> subprocess.Popen[bytes]:
        with (tmp_path / name).open("wb") as said:
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=said)

    first, metrics, limit = node("first"), tmp_path / "runs/joined/metrics.jsonl", time.monotonic() + 300
    while not metrics.is_file():
        assert time.monotonic() < limit and first.poll() is None, (tmp_path / "first").read_text()
        time.sleep(0.2)
    second = node("second")
    ended = [process.wait(timeout=300) for process in (first, second)]
    assert ended == [0, 0], (tmp_path / "first").read_text() + (tmp_path / "second").read_text()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == 750 and len(set(steps)) == 750
