"""A SLURM cluster of two nodes on this machine: one controller, two node daemons, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
CONFIG = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=20
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Control groups are not to be had in containers, hence linuxproc; without munge, hence auth/none.


def available() -> bool:
    """Whether SLURM is installed, and may be started here."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in DAEMONS)


class Cluster:
    """Commands of a running cluster."""

    def __init__(self, folder: Path):
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: str, **environment: str) -> str:
        """Standard output of a SLURM command that must succeed."""
        done = subprocess.run(
            words, env=os.environ | self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode, ..."""
        return dict(item.split("=", 1) for item in self.run("scontrol", "show", "job", number).split() if "=" in item)

    def wait(self, number: str, *states: str, timeout_s: float = 400) -> dict[str, str]:
        """The job once it is in one of these states."""
        limit = time.monotonic() + timeout_s
        while time.monotonic() < limit:
            job = self.job(number)
            if job["JobState"] in states:
                return job
            time.sleep(0.3)
        raise TimeoutError(f"job {number} is {self.job(number)['JobState']} after {timeout_s} s, not one of {states}")


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A running cluster whose files lie in `folder`; stopped in the end, jobs and all."""
    controller, first, second = free_ports(3)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    text = CONFIG.format(folder=folder, controller=controller, first=first, second=second)
    (folder / "slurm.conf").write_text(text)
    config = str(folder / "slurm.conf")
    commands = [["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    daemons = [
        subprocess.Popen([*command, "-f", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands  # they write logs of their own
    ]
    running = Cluster(folder)
    try:
        limit = time.monotonic() + 60
        while "idle" not in _states(running):
            assert time.monotonic() < limit, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)
        yield running
    finally:
        running.run("scancel", "--user=root", "--full")
        limit = time.monotonic() + 20
        while running.run("squeue", "--noheader").strip() and time.monotonic() < limit:
            time.sleep(0.3)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _states(running: Cluster) -> str:
    try:
        found = running.run("sinfo", "--noheader", "--Node", "--format=%t").split()
    except AssertionError:  # the controller is not up yet
        return ""
    return "idle" if found == ["idle", "idle"] else ""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
