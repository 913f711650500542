"""Real runs inside tests: started as a user starts them, or as ranks forked from a process that has all imported."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from clipkit import config as configuration
from clipkit import distributed
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.data.loader import Loader
from clipkit.data.mixture import open_data
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from tests.ranks import run_ranks


def launch(tree: dict, path: Path, ranks: int = 1, *, resume: bool = False) -> subprocess.Popen[str]:
    """`clipkit train` as a user starts it: alone, or by torchrun."""
    path.write_text(yaml.safe_dump(tree))
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [*(torchrun if ranks > 1 else python), "clipkit", "train", str(path), *(["--resume"] if resume else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def train_ranks(tree: dict, path: Path, ranks: int = 2, *, resume: bool = False, timeout_s: float = 120) -> None:
    """The same run as `launch` starts, to its end, without torchrun and its imports: seconds less."""
    path.write_text(yaml.safe_dump(tree))
    run_ranks(partial(train_file, str(path), resume), ranks, timeout_s=timeout_s)


def train_file(path: str, resume: bool, rank: int, world: int) -> None:
    """One rank of it."""
    train(configuration.load(path), resume=resume)


def first_batch(tree: dict) -> tuple[Config, DualEncoder, Batch]:
    """The run's config, its model as it begins, and its first batch on one rank."""
    config = configuration.validate(tree)
    torch.manual_seed(0)
    model = build(config.model).train()
    index, plan = open_data(config)
    loader = Loader(index, plan, data=config.data, preprocess=model.preprocess, tokenizer=model.tokenizer, seed=0)
    (batch,) = loader.steps(0, 1)
    return config, model, batch


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for it and all its children: torchrun's workers live in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.communicate()


def samples(folder: Path) -> str:
    return (folder / "samples.jsonl").read_text()


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def pulls(folder: Path) -> list[float]:
    """Of every step and term, its share of the gradient."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [[row[f"pull/{term}"] for term in ("infonce", "igc", "tgc", "distill")] for row in rows]
    assert all(sum(shares) == pytest.approx(1.0) for shares in found)
    return [share for shares in found for share in shares]


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("step_*"))[-1] / f"{name}.safetensors")


def cut(folder: Path) -> Path:
    """Drop the run's last checkpoint; returns where it lay."""
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    shutil.rmtree(last)
    return last


def whole_and_cut(tree: dict, rank: int, _world: int) -> tuple[Path, Path]:
    """On a rank: a run left in peace, and a copy of it that lost its end and was taken up again."""
    Engine.close = lambda _: distributed.barrier()  # type: ignore[method-assign]  # the group of ranks is the test's
    peace = train(configuration.validate(tree | {"name": "peace"}))
    again = peace.with_name("again")
    if rank == 0:
        shutil.copytree(peace, again)
        cut(again)
    distributed.barrier()
    return peace, train(configuration.validate(tree | {"name": "again"}), resume=True)


def same_bits(expected: Path, found: Path) -> None:
    """Weights and moments in the last checkpoints of two runs, and those of teachers."""
    for name in ("model", "optimizer", "teacher"):
        want, got = (
            load_file(sorted((one / "checkpoints").glob("step_*"))[-1] / f"{name}.safetensors")
            for one in (expected, found)
        )
        assert want.keys() == got.keys()
        assert all(torch.equal(value, got[key]) for key, value in want.items()), name
