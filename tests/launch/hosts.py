"""Several hosts on this machine: network namespaces made by hosts.sh, with stand-ins for ssh and pdsh between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SCRIPT = Path(__file__).parent / "hosts.sh"
ROOT = Path(__file__).parents[2]
SSH = """#!/usr/bin/env bash
# ssh [-o OPTION] HOST COMMAND...
while [ "$1" = -o ]; do shift 2; done
exec bash "{script}" on "$1" "${{@:2}}"
"""
PDSH = """#!/usr/bin/env bash
# pdsh -S -f FAN_OUT -w HOST,HOST COMMAND...: on all at once, %n being the number of each; the largest status
IFS=, read -ra hosts <<< "$5"
for number in "${{!hosts[@]}}"; do
  words="${{*:6}}"
  bash "{script}" on "${{hosts[number]}}" bash -c "${{words//%n/$number}}" &
done
status=0
for _ in "${{hosts[@]}}"; do wait -n || status=$(($? > status ? $? : status)); done
exit "$status"
"""


def environment(folder: Path) -> dict[str, str]:
    """What a run on a host is started with, from the tests' own."""
    here = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return os.environ | here | {"CLIPKIT_CACHE": str(folder / "cache")}


class Hosts:
    """Commands on hosts that are up."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = environment(folder) | {
            "HOSTS": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }

    def run(self, *words: str) -> None:
        subprocess.run(["bash", str(SCRIPT), *words], env=self.environment, check=True, capture_output=True)

    def start(self, host: str, words: Sequence[str], **variables: str) -> subprocess.Popen[str]:
        """`words` on a host, from the repository, with all that it says on one pipe."""
        return subprocess.Popen(
            ["bash", str(SCRIPT), "on", host, *words],
            env=self.environment | variables,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def received(self, host: str) -> int:
        """Bytes that came over the host's cable."""
        told = subprocess.check_output(["ip", "-n", host, "-s", "-j", "link", "show", "eth0"])
        return json.loads(told)[0]["stats64"]["rx"]["bytes"]

    def lose(self, host: str) -> None:
        """Everything on the host dies, as when its power fails."""
        found = subprocess.check_output(["ip", "netns", "pids", host], text=True).split()
        subprocess.run(["kill", "-9", *found], check=True)


def available(folder: Path) -> bool:
    """Whether hosts can be made here: it takes root, and permission for namespaces."""
    try:
        with hosts(folder, "clipkit-try"):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False


@contextmanager
def hosts(folder: Path, *names: str) -> Iterator[Hosts]:
    """Hosts of these names, gone in the end with all that runs on them."""
    (folder / "bin").mkdir(parents=True)
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (folder / "bin" / name).write_text(text.format(script=SCRIPT))
        (folder / "bin" / name).chmod(0o755)
    running = Hosts(folder)
    try:
        running.run("up", *names)
        yield running
    finally:
        subprocess.run(["bash", str(SCRIPT), "down"], env=running.environment, capture_output=True)
