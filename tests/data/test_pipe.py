"""Shards that commands write: run once, kept within bounds, ended when they fall silent."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from clipkit.data import storage
from clipkit.data.shards import Index, Pipe

from .test_remote import assert_same, refused
from .test_remote import haste as haste  # a fixture, for all tests here

pytestmark = pytest.mark.usefixtures("watchdog")


def test_a_command_is_run_once(shard_folder: Path, index: Index, tmp_path: Path, haste: Path) -> None:
    log = tmp_path / "log"
    patterns = f"pipe:echo run >> {log}; cat {shard_folder}/s-{{0..2}}.tar"
    assert_same(Index.load(patterns), index)
    assert_same(Index.load(patterns), index)
    assert log.read_text() == "run\n" * 3
    copies = list((haste / "shards").iterdir())
    sizes = sorted(shard.stat().st_size for shard in index.shards)  # type: ignore[union-attr]
    assert sorted(copy.stat().st_size for copy in copies) == sizes
    copies[0].unlink()
    assert_same(Index.load(patterns), index)
    assert log.read_text() == "run\n" * 4


def test_names_of_commands() -> None:
    assert Pipe("aws s3 cp s3://bucket/a/x-001.tar -").name == "x-001.tar"
    assert Pipe("cat 'x-1.tar' | tail -c +1").stem == "x-1"
    assert Pipe("make_data 1").name != Pipe("make_data 2").name


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo oh no >&2; exit 3", "ended with status 3: oh no"),
        ("cat /nowhere/x.tar", "status 1"),
        ("true", "not a plain tar"),
        ("echo words", "not a plain tar"),
    ],
)
def test_commands_that_fail(command: str, said: str, haste: Path) -> None:
    assert said in refused(f"pipe:{command}")
    assert not list(haste.glob("shards/.*"))


def test_a_silent_command_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "SILENCE_S", 0.1)
    monkeypatch.setattr(storage, "COPY_TRIES", 2)
    assert "wrote nothing" in refused(f"pipe:sleep 300 & echo $! >> {tmp_path}/pids; wait")
    for pid in (tmp_path / "pids").read_text().split():
        assert gone(int(pid))


def gone(pid: int) -> bool:
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_copy_that_does_not_fit_is_refused(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE_BYTES", "12_000")
    assert "raise CLIPKIT_CACHE_BYTES" in refused(f"pipe:cat {shard_folder}/s-2.tar")
    monkeypatch.setenv("CLIPKIT_CACHE_BYTES", "plenty")
    assert "number of bytes" in refused(f"pipe:cat {shard_folder}/s-1.tar")


def test_copies_that_are_not_in_use_make_room(shard_folder: Path, monkeypatch: pytest.MonkeyPatch, haste: Path) -> None:
    size = (shard_folder / "s-1.tar").stat().st_size
    monkeypatch.setenv("CLIPKIT_CACHE_BYTES", str(size + 100))
    Index.load(f"pipe:cat {shard_folder}/s-1.tar")
    assert "does not fit" in refused(f"pipe:true; cat {shard_folder}/s-1.tar")
    (copy,) = (haste / "shards").iterdir()
    os.utime(copy, (1, 1))
    assert len(Index.load(f"pipe:true; cat {shard_folder}/s-1.tar")) == 1
    assert not copy.exists()
