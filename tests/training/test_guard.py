"""Bad steps are skipped by all ranks, a run told to stop saves, and a full disk costs no checkpoint."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import clipkit
from clipkit.config import Config
from clipkit.data.mixture import open_data
from clipkit.errors import UserError
from clipkit.settings import GuardConfig
from clipkit.training.checkpoint import Checkpoints
from clipkit.training.engine import Engine
from clipkit.training.guard import Guard
from clipkit.training.loop import train
from tests.ranks import run_ranks
from tests.training.planted import plant, train_planted
from tests.training.runs import finish, launch, losses

PARTS = ("model", "teacher", "optimizer", "terms")


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> None:
    """Two checkpoints with the same bits in every table."""
    for name in PARTS:
        expected, got = (load_file(checkpoint / f"{name}.safetensors") for checkpoint in (one, other))
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {key}")


def keys(config: Config, step: int) -> list[str]:
    index, plan = open_data(config)
    return [index.where(id) for id in plan.rows(step)[0].tolist()]


@pytest.fixture
def tree(tiny_tree: dict) -> dict:
    """Teacher, a term that remembers something, and one that does of every sample."""
    of_samples = {"version": "v2", "gamma": 0.5, "visits": 2, "weight": 0.1}
    return tiny_tree | {"objective": tiny_tree["objective"] | {"rank": {}, "fastclip": of_samples}}


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("tower", ["transformer", "conv"])
def test_a_skipped_step_leaves_no_trace(tree: dict, how: str, tower: str, monkeypatch: pytest.MonkeyPatch):
    """Two steps, and two steps with two skipped behind them: the same bits, Adam's count and margins included."""
    tree["optim"] = {"lr": 1e-3, "schedule": "constant"}
    if tower == "conv":  # whose batch norms move in the forward pass
        tree["model"] |= {"image": {"conv": [[8, 2], [16, 2]], "size": 16}}
    short = tree | {"name": "short", "samples": 32, "teacher": {"kind": "ema", "half_life": 0.5}}
    peace = train(Config.model_validate(short))
    config = Config.model_validate(
        tree | {"name": "long", "samples": 64, "teacher": {"kind": "ema", "half_life": 0.25}}
    )
    monkeypatch.setattr(Engine, "embed", plant(config, [2, 3], how))
    folder = train(config)
    same(peace / "checkpoints/step_00000002", folder / "checkpoints/step_00000004")
    state = json.loads((folder / "checkpoints/step_00000004/state.json").read_text())
    assert len(state["guard"].pop("losses")) == 2
    assert state["guard"] == {"updates": 2, "skipped": 2, "streak": 2, "returned_to": None, "spikes": 0}
    lines = rows(folder)
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 2]
    assert all(line["memory_bytes"] > 50e6 for line in lines)
    assert ["loss" in line for line in lines] == [True, True, how == "gradient", how == "gradient"]
    assert ["grad_norm" in line for line in lines] == [True, True, False, False]
    events = rows(folder, "skipped")
    assert [(event["step"], event["keys"]) for event in events] == [(3, keys(config, 2)), (4, keys(config, 3))]
    assert set(events[0]["terms"]) == (set(tree["objective"]) if how == "loss" else set())


def test_taken_up_again_a_run_keeps_what_was_skipped(tree: dict, monkeypatch: pytest.MonkeyPatch):
    """Cut off behind a skipped step: the same bits at the end, and every skipped step once in the log."""
    tree |= {"samples": 128, "save_every": 64}
    monkeypatch.setattr(Engine, "embed", plant(Config.model_validate(tree), [1, 5], "loss"))
    peace = train(Config.model_validate(tree | {"name": "peace"}))
    folder = train(Config.model_validate(tree | {"name": "cut"}))
    shutil.rmtree(folder / "checkpoints/step_00000008")
    train(Config.model_validate(tree | {"name": "cut"}), resume=True)
    same(*(run / "checkpoints/step_00000008" for run in (peace, folder)))
    assert [line.get("loss") for line in rows(folder)] == [line.get("loss") for line in rows(peace)]
    assert [event["step"] for event in rows(folder, "skipped")] == [2, 6]
    assert rows(folder)[-1]["skipped_steps"] == 2


def test_three_in_a_row_send_the_run_back_once(tree: dict, monkeypatch: pytest.MonkeyPatch):
    """Back to the weights of step 4, on behind the bad batches; a second time there is an error."""
    tree |= {"samples": 192, "save_every": 64, "keep": 9}
    config = Config.model_validate(tree)
    monkeypatch.setattr(Engine, "embed", plant(config, [5, 6, 7], "loss"))
    folder = train(config)
    events = rows(folder, "skipped")
    assert [event["step"] for event in events] == [6, 7, 8, 8] and events[-1] == {"step": 8, "back_to": 4}
    same(folder / "checkpoints/step_00000004", folder / "checkpoints/step_00000008")
    lines = rows(folder)
    assert [line["step"] for line in lines] == list(range(1, 13)) and "loss" in lines[8]
    state = json.loads((folder / "checkpoints/step_00000012/state.json").read_text())
    assert len(state["guard"].pop("losses")) == 9
    assert state["guard"] == {"updates": 8, "skipped": 3, "streak": 0, "returned_to": 4, "spikes": 0}

    again = Config.model_validate(tree | {"name": "again"})
    monkeypatch.setattr(Engine, "embed", plant(again, range(5, 12), "gradient"))
    with pytest.raises(UserError, match="3 steps in a row were skipped.* again after going back .* 4 updates"):
        train(again)
    # That of step 8 holds the weights of step 4: the same place.
    assert [path.name for path in sorted((again.run_folder / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000008",
    ]


def test_without_a_checkpoint_there_is_no_way_back(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    config = Config.model_validate(tiny_tree | {"guard": {"patience": 2}})
    monkeypatch.setattr(Engine, "embed", plant(config, [0, 1], "loss"))
    with pytest.raises(UserError, match="2 steps in a row .* no checkpoint from before them"):
        train(config)


@pytest.mark.parametrize(
    ("engine", "how"),
    [
        ({"kind": "ddp"}, "loss"),
        ({"kind": "ddp", "accumulate": 2}, "gradient"),
        ({"kind": "fsdp"}, "gradient"),
        ({"kind": "deepspeed", "zero_stage": 1}, "gradient"),
        ({"kind": "deepspeed", "zero_stage": 2, "accumulate": 2}, "loss"),
        ({"kind": "deepspeed", "zero_stage": 0, "accumulate": 2}, "gradient"),
        ({"kind": "deepspeed", "zero_stage": 3}, "gradient"),
        ({"kind": "deepspeed", "zero_stage": 1, "offload": "optimizer"}, "gradient"),
        ({"kind": "deepspeed", "zero_stage": 3, "offload": "all"}, "loss"),
    ],
    ids=["ddp", "ddp_parts", "fsdp", "zero1", "zero2_parts", "zero0_parts", "zero3", "zero1_host", "zero3_host"],
)
def test_planted_at_one_rank_all_skip_and_go_back(
    tree: dict, engine: dict, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two ranks with NaN at the second one do what one process does: skip, go on, go back, go on."""
    tree |= {"samples": 192, "save_every": 64, "engine": engine | {"timeout_s": 60}}
    tree |= {"optim": tree["optim"] | {"eps": 1e-3}}  # AdamW makes whole steps of gradients that are only rounding
    alone = Config.model_validate(tree | {"name": "alone", "engine": {}})
    steps = [1, 5, 6, 7]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "embed", plant(alone, steps, how))
        peace = train(alone)
    planted = {"steps": steps, "how": how, "rank": 1}
    run_ranks(partial(train_planted, tree | {"name": "two"}, planted), 2, timeout_s=120)
    two = tmp_path / "runs/two"
    assert [line["step"] for line in rows(two)] == list(range(1, 13))
    for one, other in zip(rows(peace), rows(two)):
        assert other.get("loss") == pytest.approx(one.get("loss"), abs=1e-5), one["step"]
        assert other.get("skipped_steps") == one.get("skipped_steps")
    # Which terms are not finite depends on how many of the pairs were spoiled: all of them here, half of them there.
    said = [[(event["step"], event.get("keys")) for event in rows(folder, "skipped")] for folder in (two, peace)]
    assert said[0] == said[1] and len(said[0]) >= len(steps)


def _judged(rank: int, world: int) -> list[tuple[bool, bool]]:
    found = []
    with Guard(GuardConfig()) as guard:
        for step in range(3):
            if (rank, step) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            norm = torch.tensor(float("inf") if (rank, step) == (0, 0) else 1.0)
            found.append((guard.passes(norm, norm), guard.stopping))
    return found


def test_what_happens_at_one_rank_is_known_at_all():
    for found in run_ranks(_judged, 2, timeout_s=60):
        assert found == [(False, False), (True, True), (True, True)]


def wait_for(folder: Path, steps: int) -> None:
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while (log.read_text().count("\n") if log.is_file() else 0) < steps and time.monotonic() < deadline:
        time.sleep(0.005)


def test_a_signal_saves_and_ends_with_the_requeue_code(tree: dict, tmp_path: Path):
    """SIGTERM to trainer and loader processes alike, as schedulers send it; resumed, the same bits as in peace."""
    tree |= {"samples": 16 * 60, "data": tree["data"] | {"workers": 1}}
    finish(launch(tree | {"name": "peace"}, tmp_path / "peace.yaml"))
    process, folder = launch(tree | {"name": "told"}, tmp_path / "told.yaml"), tmp_path / "runs/told"
    wait_for(folder, 2)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = len(losses(folder))
    assert process.returncode == 75 and checkpoint.name == f"step_{step:08d}" and 2 <= step < 60, output
    assert f"stopped after step {step}, saved; go on with --resume" in output and "Traceback" not in output
    finish(launch(tree | {"name": "told"}, tmp_path / "told.yaml", resume=True))
    same(*(tmp_path / "runs" / name / "checkpoints/step_00000060" for name in ("peace", "told")))
    assert losses(folder) == losses(tmp_path / "runs/peace")


def test_a_signal_to_one_of_two_ranks_ends_both(tree: dict, tmp_path: Path):
    """SIGUSR1 to the second rank alone: both save the same step and leave with the code that was set."""
    tree |= {"samples": 16 * 200, "engine": {"timeout_s": 60}, "guard": {"requeue_code": 99}}
    process, folder = launch(tree, tmp_path / "two.yaml", ranks=2), tmp_path / "runs/tiny"
    wait_for(folder, 2)
    ranks = [one for one in psutil.Process(process.pid).children() if one.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = len(losses(folder))
    assert checkpoint.name == f"step_{step:08d}" and step < 200, output
    assert {f"rng_{rank}.safetensors" for rank in (0, 1)} < {path.name for path in checkpoint.iterdir()}
    assert "exitcode  : 99" in output and f"stopped after step {step}" in output


@pytest.fixture
def begun(tree: dict) -> Config:
    """A run of two steps with its checkpoint; the config to go on with."""
    train(Config.model_validate(tree | {"samples": 32}))
    return Config.model_validate(tree | {"samples": 64})


def refused(config: Config, match: str) -> None:
    """Going on ends with one clear error; the checkpoint from before is whole, and nothing else is left."""
    old = config.run_folder / "checkpoints/step_00000002"
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.raises(UserError, match=f"step_00000004: cannot be written: {match}.*step_00000002 stays as it was"):
        train(config, resume=True)
    assert list(old.parent.iterdir()) == [old]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    clipkit.load(config.run_folder)


def test_too_little_room_is_said_before_writing(begun: Config, monkeypatch: pytest.MonkeyPatch):
    size = sum(path.stat().st_size for path in (begun.run_folder / "checkpoints/step_00000002").iterdir())
    usage = shutil.disk_usage(begun.run_folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
        refused(begun, r"it takes \d+.\d MB and \d+.\d MB are free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + 2_000_000))
    train(begun, resume=True)
    assert (begun.run_folder / "checkpoints/step_00000004").is_dir()


def test_a_write_that_fails_half_way(begun: Config):
    """The system takes no file above a size: met in the middle of the weights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        refused(begun, ".*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_really_is_full(tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file system that holds one checkpoint and a half, once seen beforehand and once not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        tree |= {"out": str(disk / "run")}
        train(Config.model_validate(tree | {"samples": 32}))
        size = int(1.5 * shutil.disk_usage(disk).used)
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
        config = Config.model_validate(tree | {"samples": 64})
        refused(config, "it takes .* MB are free")
        usage = shutil.disk_usage(disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
        refused(config, ".*No space left on device")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)  # lazily: nothing must hang on a file still mapped


def _one_cannot_write(rank: int, world: int, folder: Path) -> str:
    def work() -> None:
        if rank == 1:
            raise OSError("No space left on device")

    unused: Any = None
    run = Checkpoints(folder, unused, unused, unused, unused, unused, unused)
    with pytest.raises(UserError) as caught:
        run._together(folder / "checkpoints/step_00000002", work)
    return str(caught.value)


def test_where_one_rank_cannot_write_all_end(tmp_path: Path):
    (tmp_path / "checkpoints/.step_00000002.partial").mkdir(parents=True)
    said = run_ranks(partial(_one_cannot_write, folder=tmp_path), 2, timeout_s=60)
    assert said[0] == said[1] and "No space left on device; no checkpoint from before" in said[0]
    assert not list((tmp_path / "checkpoints").iterdir())
