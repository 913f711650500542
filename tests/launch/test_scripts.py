"""The launchers, with an interpreter that only says what it was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
HERE, CI = Path(__file__).parent, LAUNCH.parent / ".ci" / "run"
SCRIPTS = sorted(p.name for p in LAUNCH.glob("*.sh") if p.name != "common.sh")


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    path.write_text(
        '#!/bin/sh\necho "$@"\necho OMP=$OMP_NUM_THREADS STORE=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE PATH=$PATH\n'
    )
    path.chmod(0o755)
    return path


def launch(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["bash", str(LAUNCH / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment)


def asked(script: str, *words: str, **environment: str) -> tuple[str, str]:
    """(arguments, environment) with which the interpreter was started."""
    done = launch(script, *words, **environment)
    assert done.returncode == 0, done.stderr
    arguments, variables = done.stdout.splitlines()
    return arguments, variables


def test_there_are_four() -> None:
    assert SCRIPTS == ["deepspeed.sh", "local.sh", "slurm.sh", "torchrun.sh"]


@pytest.mark.parametrize("path", [*LAUNCH.glob("*.sh"), *HERE.glob("*.sh"), CI], ids=lambda path: path.name)
def test_they_are_clean_shell(path: Path) -> None:
    assert (path.name == "common.sh") != os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if shellcheck.is_file():
        found = subprocess.run([str(shellcheck), "-x", str(path)], cwd=LAUNCH.parent, capture_output=True, text=True)
        assert found.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_they_explain_themselves(script: str) -> None:
    helped = launch(script, "--help")
    assert helped.returncode == 0 and f"launch/{script}" in helped.stdout.splitlines()[0]
    nothing = launch(script)
    assert nothing.returncode == 2 and nothing.stdout == "" and nothing.stderr == helped.stdout


def test_local_starts_that_many_processes(interpreter: Path) -> None:
    arguments, variables = asked("local.sh", "-n", "2", "degla", "seed=1", "--resume", PYTHON=str(interpreter))
    assert arguments == (
        "-m clipkit.agent --standalone --nproc-per-node 2 --max-restarts 0 -m clipkit train degla seed=1 --resume"
    )
    cores = os.cpu_count() or 1
    assert f"OMP={max(cores // 2, 1)} STORE=1 PATH={interpreter.parent}:" in variables


def test_what_is_set_stays_set(interpreter: Path) -> None:
    arguments, variables = asked("local.sh", "degla", PYTHON=str(interpreter), OMP_NUM_THREADS="3", RESTARTS="5")
    assert "--max-restarts 5" in arguments and "OMP=3 " in variables


def test_torchrun_meets_at_the_master(interpreter: Path) -> None:
    arguments, _ = asked(
        "torchrun.sh", "degla", "a=b", PYTHON=str(interpreter), NNODES="2:4", MASTER_ADDR="node1", NPROC="8", JOB_ID="7"
    )
    assert arguments == (
        "-m clipkit.agent --nnodes 2:4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29400 "
        "--rdzv-id 7 --rdzv-conf join_timeout=600,read_timeout=600 --max-restarts 3 -m clipkit train degla a=b"
    )


@pytest.mark.parametrize(("number", "host"), [("0", "true"), ("3", "false")])
def test_a_numbered_node_knows_whether_all_meet_there(interpreter: Path, number: str, host: str) -> None:
    arguments, _ = asked("torchrun.sh", "degla", PYTHON=str(interpreter), NODE_RANK=number, JOIN_S="9")
    assert f"--rdzv-conf join_timeout=9,read_timeout=9,is_host={host} " in arguments


def test_a_run_that_may_shrink_waits_as_long_as_it_is_told(interpreter: Path) -> None:
    arguments, _ = asked("torchrun.sh", "degla", PYTHON=str(interpreter), NNODES="1:2", JOIN_S="9", LAST_CALL_S="3")
    assert "--nnodes 1:2 " in arguments
    assert "--rdzv-conf join_timeout=9,read_timeout=9,last_call_timeout=3 " in arguments


def test_slurm_finds_what_it_shares_where_it_is_told(interpreter: Path, tmp_path: Path) -> None:
    for name, does in {
        "srun": 'shift; exec env SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 "$@"',
        "scontrol": "echo n1",
    }.items():
        (interpreter.parent / name).write_text(f"#!/bin/sh\n{does}\n")
        (interpreter.parent / name).chmod(0o755)
    interpreter.write_text('#!/bin/sh\necho "$@"\necho $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT\n')
    arguments, variables = asked(
        *("slurm.sh", "degla", "seed={array}", "a=b c"),
        PATH=f"{interpreter.parent}:{os.environ['PATH']}",
        PYTHON=str(interpreter),
        CLIPKIT_LAUNCH=str(LAUNCH),
        SLURM_JOB_ID="17",
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_ARRAY_TASK_ID="2",
    )
    assert arguments == "-m clipkit train degla seed=2 a=b c --resume"
    assert variables == "3 4 1 n1:20017"


@pytest.mark.parametrize(
    ("words", "environment", "where"),
    [
        (("-n", "2"), {}, "--num_gpus 2"),
        (("-H", "hosts"), {}, "--hostfile hosts --force_multi"),
        (
            ("-H", "hosts"),
            {"NODE_RANK": "1", "MASTER_ADDR": "node1"},
            "--hostfile hosts --force_multi --no_ssh --node_rank 1 --master_addr node1",
        ),
    ],
)
def test_deepspeed_sets_its_engine(
    interpreter: Path, words: tuple[str, ...], environment: dict[str, str], where: str
) -> None:
    arguments, _ = asked("deepspeed.sh", *words, "degla", "engine.zero_stage=2", PYTHON=str(interpreter), **environment)
    assert arguments == (
        f"-m deepspeed.launcher.runner {where} --master_port 29500 --no_local_rank --module "
        "clipkit train degla engine.kind=deepspeed engine.zero_stage=2"
    )


def test_a_node_without_ssh_must_know_the_first_host(interpreter: Path) -> None:
    done = launch("deepspeed.sh", "-H", "hosts", "degla", PYTHON=str(interpreter), NODE_RANK="0")
    assert done.returncode != 0 and "name the first host" in done.stderr
