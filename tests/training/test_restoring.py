"""What a run does with the checkpoints that it finds: damaged ones, copies, those of fewer ranks, of a longer run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import clipkit
from clipkit import config as configuration
from clipkit.errors import UserError
from clipkit.model.spec import whole_checkpoints
from clipkit.training.loop import train
from tests.training.runs import losses, train_ranks


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_shards: str) -> Path:
    """A run of four steps, each saved."""
    from tests.training.conftest import degla_tree

    tree = degla_tree(tiny_shards, tmp_path_factory.mktemp("finished"))
    return train(configuration.validate(tree | {"samples": 64, "save_every": 16, "keep": 9}))


@pytest.fixture
def run(finished: Path, tiny_tree: dict) -> Path:
    """A copy of it where `tiny_tree` resumes."""
    folder = configuration.validate(tiny_tree).run_folder
    shutil.copytree(finished, folder)
    return folder


def going_on(tree: dict, **settings: object) -> Path:
    return train(configuration.validate(tree | {"samples": 80, "save_every": 16, "keep": 9} | settings), resume=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("optimizer.safetensors", Path.unlink, "optimizer.safetensors is not there"),
        ("teacher.safetensors", Path.unlink, "teacher.safetensors is not there"),
        ("model.safetensors", Path.unlink, "model.safetensors is not there"),
        ("rng_0.safetensors", Path.unlink, "rng_0.safetensors is not there"),
        ("model.safetensors", cut, "model cannot be read"),
        ("optimizer.safetensors", cut, "optimizer cannot be read"),
        ("state.json", cut, "state.json cannot be read"),
        ("state.json", Path.unlink, "state.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_said(
    run: Path, tiny_tree: dict, name: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(whole_checkpoints(run)[-1] / name)
    with pytest.raises(UserError, match=f"step_00000004: {said}"):
        going_on(tiny_tree)
    if name.startswith("model."):
        with pytest.raises(UserError, match=f"step_00000004: {said}"):
            clipkit.load(run)


def test_one_without_a_teacher_is_said(run: Path, tiny_tree: dict) -> None:
    going_on(tiny_tree, teacher={"kind": "none"}, objective={"infonce": {}})
    with pytest.raises(UserError, match="teacher: the checkpoint holds none; resume with teacher.kind=none"):
        going_on(tiny_tree, samples=96)


def test_copies_are_no_checkpoints(run: Path, tiny_tree: dict) -> None:
    """A folder of another name is neither read, nor counted, nor removed."""
    last = whole_checkpoints(run)[-1]
    for copy in ("step_00000004.bak", "step_00000001_good", "step_best"):
        shutil.copytree(last, last.with_name(copy))
    (last.with_name("step_00000004.bak") / "model.safetensors").unlink()
    assert clipkit.load(run)
    going_on(tiny_tree, keep=1, keep_every=48)
    assert sorted(path.name for path in last.parent.iterdir()) == [
        "step_00000001_good", "step_00000003", "step_00000004.bak", "step_00000005", "step_best",
    ]  # fmt: skip


def test_what_a_kill_left_half_written_goes(run: Path, tiny_tree: dict) -> None:
    half = run / "checkpoints/.step_00000003.partial"
    half.mkdir()
    (half / "model.safetensors").touch()
    going_on(tiny_tree)
    assert not half.exists()


def test_a_run_that_went_further_is_said(run: Path, tiny_tree: dict) -> None:
    with pytest.raises(UserError, match="step_00000004: lies behind the run's end: samples=32 is 2 steps; .*=64"):
        going_on(tiny_tree, samples=32)


def test_more_ranks_draw_as_fewer_did(tiny_tree: dict, tmp_path: Path) -> None:
    """Dropout, too: a rank that the saving world did not have goes on from the first one's random state."""
    tree = tiny_tree | {"save_every": 32, "keep": 9, "samples": 64}
    tree["model"] = tree["model"] | {"text": tree["model"]["text"] | {"dropout": 0.3}}
    alone = train(configuration.validate(tree | {"name": "alone"}))
    shutil.copytree(alone, tmp_path / "runs/more")
    shutil.rmtree(whole_checkpoints(tmp_path / "runs/more")[-1])
    train_ranks(tree | {"name": "more"}, tmp_path / "more.yaml", 2, resume=True)
    assert losses(tmp_path / "runs/more") == pytest.approx(losses(alone), abs=1e-5)
