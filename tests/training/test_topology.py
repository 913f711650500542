"""Invariants 1 and 3: losses do not depend on the topology; killed and resumed equals never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.data.build import write_shards
from clipkit.data.mixture import open_data
from clipkit.errors import PeerFailed
from clipkit.model.embeddings import Embeddings
from clipkit.training.checkpoint import whole_checkpoints
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from tests.ranks import RankError, run_ranks, started
from tests.training.conftest import degla_tree, tiny_samples
from tests.training.planted import EMBED
from tests.training.runs import finish, kill, launch, losses, pulls, samples, train_file, train_ranks, weights

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"


@pytest.fixture(scope="module")
def alone(tiny_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the reference: one process, never disturbed."""
    folder = tmp_path_factory.mktemp("alone")
    finish(launch(degla_tree(tiny_shards, folder) | {"name": "alone"}, folder / "alone.yaml"))
    return folder / "runs" / "alone"


def test_golden_losses_and_two_ranks(alone: Path, tiny_tree: dict, tmp_path: Path):
    """One process, and DDP, FSDP and ZeRO-0 to 3 on two ranks, whole, in parts and with blocks computed again: the same
    20 losses, and those on file; the same teacher. Furthest off are biases of keys, whose gradient is only rounding."""
    reference = losses(alone)
    assert len(reference) == 20
    assert reference == pytest.approx(json.loads(GOLDEN.read_text())["degla"], abs=2e-4)
    for name, engine in (
        ("ddp", {"kind": "ddp"}),
        ("zero0_parts", {"kind": "deepspeed", "zero_stage": 0, "accumulate": 2}),
        ("zero1", {"kind": "deepspeed", "zero_stage": 1}),
        ("zero2", {"kind": "deepspeed", "zero_stage": 2}),
        ("zero3", {"kind": "deepspeed", "zero_stage": 3}),
        ("fsdp", {"kind": "fsdp"}),
        ("fsdp_parts", {"kind": "fsdp", "accumulate": 2}),
        ("ddp_parts", {"kind": "ddp", "accumulate": 2, "checkpoint_activations": True}),
        ("zero2_parts", {"kind": "deepspeed", "zero_stage": 2, "accumulate": 4, "checkpoint_activations": True}),
    ):
        tree = tiny_tree | {"name": name, "engine": engine | {"timeout_s": 60}}
        train_ranks(tree, tmp_path / f"{name}.yaml")
        folder = tmp_path / "runs" / name
        assert losses(folder) == pytest.approx(reference, abs=1e-5), name
        assert pulls(folder) == pytest.approx(pulls(alone), abs=1e-4), name
        assert samples(folder) == samples(alone), name
        for key, value in weights(alone, "teacher").items():
            torch.testing.assert_close(weights(folder, "teacher")[key], value, atol=1e-5, rtol=0, msg=f"{name} {key}")


def test_killed_and_resumed_equals_never_killed(alone: Path, tiny_tree: dict, tmp_path: Path):
    """SIGKILL in the middle; the resumed run ends with the same bits, and the log has each step once."""
    tree = tiny_tree | {"name": "killed", "save_every": 64}
    process = launch(tree, tmp_path / "killed.yaml")
    folder = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)
    assert list((folder / "checkpoints").glob("step_*")), "it was killed before its first checkpoint"
    assert len(losses(folder)) < 20, "it was killed too late to be resumed"
    finish(launch(tree, tmp_path / "killed.yaml", resume=True))
    for name in ("model", "teacher", "optimizer"):
        expected, got = weights(alone, name), weights(folder, name)
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            assert torch.equal(value, got[key]), f"{name}: {key}"
    assert losses(folder) == losses(alone) and samples(folder) == samples(alone)


def test_resume_on_another_topology(alone: Path, tiny_tree: dict, tmp_path: Path):
    """Begun with ZeRO-1 on two ranks, finished alone: the checkpoint holds everything in full."""
    tree = tiny_tree | {"name": "moved", "samples": 320, "save_every": 160, "keep": 9}
    sharded = tree | {"engine": {"kind": "deepspeed", "timeout_s": 60}}
    train_ranks(sharded, tmp_path / "moved.yaml")
    folder = tmp_path / "runs" / "moved"
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    for part in last.iterdir():
        part.unlink()
    last.rmdir()
    finish(launch(tree, tmp_path / "moved.yaml", resume=True))
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5) and samples(folder) == samples(alone)


def test_sources_resumed_on_another_world_size(tiny_tree: dict, tmp_path: Path):
    """Two sources, two ranks, killed in the middle of an epoch, finished alone: the samples the plan says."""
    write_shards(tiny_samples(20), tmp_path, per_shard=7, name="more", progress=False)
    sources = {
        "tiny": {"train": tiny_tree["data"].pop("train"), "weight": 3},
        "more": {"train": [str(tmp_path / "more-*.tar")], "weight": 1},
    }
    tree = tiny_tree | {"name": "mixed", "save_every": 48, "data": tiny_tree["data"] | {"sources": sources}}
    process = launch(tree, tmp_path / "mixed.yaml", ranks=2)
    folder = tmp_path / "runs" / "mixed"
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)
    assert len(losses(folder)) < 20, "it was killed too late to be resumed"
    finish(launch(tree, tmp_path / "mixed.yaml", resume=True))
    plan = open_data(configuration.load(tmp_path / "mixed.yaml"))[1]
    found = [json.loads(line)["ids"] for line in samples(folder).splitlines()]
    assert found == [plan.rows(step)[0].tolist() for step in range(20)]
    assert all(sum(id < 20 for id in ids) == 4 for ids in found)


def steps_logged(folder: Path) -> int:
    return samples(folder).count("\n") if (folder / "samples.jsonl").is_file() else 0


def _killed(path: str, at: int, rank: int, world: int) -> None:
    """Go on with the run; its last rank is killed in the step of number `at` from there."""
    steps = 0

    def embed(engine: Engine, batch: Batch) -> Embeddings:
        nonlocal steps
        steps += 1
        if steps == at and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return EMBED(engine, batch)

    Engine.embed = embed
    train(configuration.load(path), resume=True)


def test_killed_on_two_ranks_resumed_on_one_and_back(alone: Path, tiny_tree: dict, tmp_path: Path):
    """Whatever number of ranks goes on from the newest checkpoint, it is the run of one process left in peace."""
    path, folder = tmp_path / "run.yaml", tmp_path / "runs" / "tiny"
    path.write_text(yaml.safe_dump(tiny_tree | {"save_every": 16 * 2, "engine": {"timeout_s": 60}}))
    for ranks, at in ((2, 6), (1, 4), (2, 5), (1, 6)):
        with pytest.raises((RankError, PeerFailed, RuntimeError)):
            run_ranks(partial(_killed, str(path), at), ranks, timeout_s=60)
    assert 10 <= steps_logged(folder) < 20
    run_ranks(partial(_killed, str(path), 0), 2, timeout_s=60)
    assert samples(folder) == samples(alone)
    assert losses(folder) == pytest.approx(losses(alone), abs=1e-5)


@dataclass
class War:
    """Two runs' folders, one left in peace and one killed fifty times; and how that went."""

    peace: Path
    war: Path
    starting: int = 0
    """Kills before the first step."""
    saving: int = 0
    """Kills that left a half-written checkpoint behind."""
    lost: int = 0
    """Steps that had to be taken again."""

    def kill(self, path: Path, world: int, rng: random.Random) -> None:
        """Let `world` ranks go on, and kill one or all of them at a random moment.

        A fifth of the kills comes while the ranks start, two fifths when they are seen to save, the others within a
        few steps of where they went on. Ranks that train end by themselves then; those that start wait for the killed
        one to join, until a launcher ends them.
        """
        before, moment = steps_logged(self.war), rng.random()
        with started(partial(train_file, str(path), True), world, timeout_s=60) as (ranks, _):
            if moment < 0.2:
                time.sleep(rng.uniform(0, 1.5))
            else:
                goal = before + rng.randint(1, 8)
                self._wait(ranks, lambda: steps_logged(self.war) >= goal)
                if moment < 0.6:
                    self._wait(ranks, lambda: bool(half_written(self.war)))
                else:
                    time.sleep(rng.uniform(0, 0.3))
            assert all(rank.is_alive() for rank in ranks), "the run was over, or had failed, before it was killed"
            for rank in rng.sample(ranks, 1) if rng.random() < 0.7 else ranks:
                rank.kill()
            for rank in ranks if moment >= 0.2 else ():
                rank.join(timeout=40)
                assert not rank.is_alive(), "a rank was left waiting"
        whole = whole_checkpoints(self.war)
        self.starting += steps_logged(self.war) == before
        self.saving += bool(half_written(self.war))
        self.lost += steps_logged(self.war) - (int(whole[-1].name.removeprefix("step_")) if whole else 0)

    @staticmethod
    def _wait(ranks: list[BaseProcess], seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not seen() and all(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.0005)


def kill_often(tree: dict, folder: Path, ranks: Callable[[random.Random], int]) -> War:
    """A run on two ranks left in peace, and one killed fifty times; `ranks`: how many go on each time."""
    rng, fought = random.Random(0), War(*(folder / "runs" / name for name in ("peace", "war")))
    tree = tree | {"save_every": 16 * 2, "engine": {"timeout_s": 60}}
    train_ranks(tree | {"name": "peace"}, folder / "peace.yaml", timeout_s=900)
    (folder / "war.yaml").write_text(yaml.safe_dump(tree | {"name": "war"}))
    for _ in range(50):
        fought.kill(folder / "war.yaml", ranks(rng), rng)
    assert steps_logged(fought.war) < tree["samples"] // 16
    train_ranks(tree | {"name": "war"}, folder / "war.yaml", ranks(rng), resume=True, timeout_s=900)
    print(f"killed while starting {fought.starting}, while saving {fought.saving}; {fought.lost} steps taken again")
    assert fought.saving >= 5 and not half_written(fought.war)
    return fought


def half_written(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob(".step_*"))


@pytest.mark.slow
def test_fifty_kills(tiny_tree: dict, tmp_path: Path):
    """Two ranks: samples, losses and, bit for bit, the last checkpoint are those of a run left in peace."""
    fought = kill_often(tiny_tree | {"samples": 16 * 500}, tmp_path, lambda rng: 2)
    peace, war = fought.peace, fought.war
    assert samples(war) == samples(peace)
    assert losses(war) == losses(peace)
    for name in ("model", "teacher", "optimizer"):
        last = [run / f"checkpoints/step_00000500/{name}.safetensors" for run in (peace, war)]
        assert last[0].read_bytes() == last[1].read_bytes(), name


@pytest.mark.slow
def test_fifty_kills_on_one_rank_and_on_two(tiny_tree: dict, tmp_path: Path):
    """One rank goes on where two were killed, and two where one was: the same samples, the losses to rounding."""
    fought = kill_often(tiny_tree | {"samples": 16 * 500}, tmp_path, lambda rng: rng.randint(1, 2))
    peace, war = fought.peace, fought.war
    assert samples(war) == samples(peace)
    print(f"largest deviation of a loss: {max(abs(a - b) for a, b in zip(losses(war), losses(peace))):.2e}")
    assert losses(war) == pytest.approx(losses(peace), abs=1e-5)
