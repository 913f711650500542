"""Checkpoints in pieces, one a rank: the numbers of the full form, read by every engine and number of ranks."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import clipkit
from clipkit import config as configuration
from clipkit import distributed
from clipkit.errors import PeerFailed, UserError
from clipkit.model import pieces
from clipkit.model.pieces import load_table, save_pieces, share
from clipkit.training import checkpoint as saving
from clipkit.training import zero
from clipkit.training.checkpoint import whole_checkpoints
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from clipkit.training.meeting import Meeting
from tests.ranks import run_ranks
from tests.training.runs import cut, losses, samples

ENGINES = {
    "ddp": {},
    "fsdp": {"kind": "fsdp"},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
APART = ("ddp", "fsdp", "zero2", "zero3")
"""Those that know their pieces in ways of their own."""
TABLES = ("model", "teacher", "terms", "optimizer")


def tables(run: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors of the run's newest checkpoint."""
    return {name: load_table(whole_checkpoints(run)[-1], name) for name in TABLES}


def same(expected: Path, found: Path) -> None:
    for name, table in tables(expected).items():
        assert table.keys() == tables(found)[name].keys(), name
        for key, value in tables(found)[name].items():
            assert value.dtype == table[key].dtype and torch.equal(value, table[key]), f"{name}: {key}"


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_pieces_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    whole = {"matrix": torch.randn(4, 7), "scale": torch.randn(1), "count": torch.tensor(3), "none": torch.empty(0, 2)}
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        held = {name: share(x) for name, x in whole.items()}
        layout = {name: (piece.start, piece.shape) for name, piece in held.items()}
        save_pieces({name: piece.values for name, piece in held.items()}, layout, tmp_path, "model")
    found = load_table(tmp_path, "model")
    assert found.keys() == whole.keys() - {"none"}
    assert all(torch.equal(x, whole[name]) and x.dtype == whole[name].dtype for name, x in found.items())
    assert load_table(tmp_path, "teacher") == {}
    assert found["matrix"].data_ptr() != found["matrix"].data_ptr()  # put together when asked for, not kept
    if world > 1:
        (tmp_path / f"model-00001-of-{world:05d}.safetensors").unlink()
        with pytest.raises(UserError, match=f"model-00001-of-{world:05d}.safetensors is not there, a part of model"):
            load_table(tmp_path, "model")


def _both_forms(tree: dict, _rank: int, _world: int) -> None:
    zero.RESIDENT = 0
    Engine.close = lambda _: distributed.barrier()  # type: ignore[method-assign]  # the group of ranks is the test's
    for name in APART:
        for form in ("full", "sharded"):
            each = {"name": f"{name}_{form}", "engine": ENGINES[name], "save_form": form}
            train(configuration.validate(tree | each))


def test_they_hold_what_the_full_form_holds(tiny_tree: dict, tmp_path: Path) -> None:
    """Under each engine on two ranks, to the bit; where ranks divide moments, each writes those it has."""
    run_ranks(partial(_both_forms, tiny_tree | {"samples": 48}), 2, timeout_s=300)
    for name in APART:
        full, sharded = (tmp_path / "runs" / f"{name}_{form}" for form in ("full", "sharded"))
        assert losses(full) == losses(sharded)
        same(full, sharded)
        last = whole_checkpoints(sharded)[-1]
        sizes = [(last / f"optimizer-0000{rank}-of-00002.safetensors").stat().st_size for rank in range(2)]
        assert max(sizes) < 1.3 * min(sizes) and not (last / "optimizer.safetensors").exists(), name
        text = ["a red wall"]
        assert torch.equal(clipkit.load(sharded).embed_texts(text), clipkit.load(full).embed_texts(text))


def _go_on(tree: dict, _rank: int, _world: int) -> Path:
    zero.RESIDENT = 0
    return train(configuration.validate(tree), resume=True)


def test_taken_up_again_on_others(tiny_tree: dict, tmp_path: Path) -> None:
    """FSDP on two ranks, ZeRO-1 on two, ZeRO-3 on two, one process: the run of one process left in peace."""
    tree = tiny_tree | {"samples": 16 * 8, "save_every": 32, "keep": 9, "save_form": "sharded"}
    tree["objective"] = tiny_tree["objective"] | {"sogclr": {}}
    alone = train(configuration.validate(tree | {"name": "alone", "save_form": "full"}))
    moved = tmp_path / "runs/moved"
    for number, engine in enumerate(("fsdp", "zero1", "zero3", None), start=1):
        each = tree | {"name": "moved", "engine": ENGINES[engine] | {"timeout_s": 60} if engine else {}}
        run_ranks(partial(_go_on, each), 2 if engine else 1, timeout_s=300)
        for later in whole_checkpoints(moved)[number:]:
            shutil.rmtree(later)
    train(configuration.validate(tree | {"name": "moved"}), resume=True)
    assert samples(moved) == samples(alone)
    assert losses(moved) == pytest.approx(losses(alone), abs=1e-5)
    torch.testing.assert_close(tables(moved)["terms"], tables(alone)["terms"], rtol=0, atol=1e-4)


def test_to_the_bit_on_the_same_ranks(tiny_tree: dict, tmp_path: Path) -> None:
    tree = tiny_tree | {"samples": 64, "save_every": 32, "save_form": "sharded", "engine": {"kind": "fsdp"}}
    for name in ("peace", "again"):
        run_ranks(partial(_go_on, tree | {"name": name}), 2, timeout_s=60)
    cut(tmp_path / "runs/again")
    run_ranks(partial(_go_on, tree | {"name": "again"}), 2, timeout_s=60)
    same(tmp_path / "runs/peace", tmp_path / "runs/again")
    assert losses(tmp_path / "runs/peace") == losses(tmp_path / "runs/again")


def _fails(tree: dict, rank: int, _world: int) -> str:
    write = pieces.save_pieces

    def failing(values: dict, layout: pieces.Layout, folder: Path, name: str) -> None:
        if rank == 1 and name == "teacher" and "step_00000004" in folder.name:
            raise OSError("the disk is gone")
        write(values, layout, folder, name)

    saving.save_pieces = failing
    with pytest.raises((UserError, PeerFailed)) as told:
        train(configuration.validate(tree))
    return str(told.value)


def test_a_rank_that_cannot_write_spoils_nothing(tiny_tree: dict, tmp_path: Path) -> None:
    """The checkpoint before stays, nothing half is left, and both ranks say why."""
    tree = tiny_tree | {"samples": 96, "save_every": 32, "save_form": "sharded", "engine": {"timeout_s": 60}}
    for told in run_ranks(partial(_fails, tree), 2, timeout_s=120):
        assert "step_00000004: cannot be written: the disk is gone; step_00000002 stays as it was" in told
    assert [path.name for path in (tmp_path / "runs/tiny/checkpoints").iterdir()] == ["step_00000002"]


def _says_nothing(tree: dict, rank: int, _world: int) -> str:
    if rank == 1:
        Meeting.tell = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises((UserError, PeerFailed)) as told:
        train(configuration.validate(tree))
    return str(told.value)


def test_nobody_waits_for_ever(tiny_tree: dict, tmp_path: Path) -> None:
    tree = tiny_tree | {"samples": 96, "save_every": 32, "save_form": "sharded", "engine": {"timeout_s": 2}}
    for told in run_ranks(partial(_says_nothing, tree), 2, timeout_s=60):
        assert "step_00000002: cannot be written: not all ranks have written their parts" in told
    assert not list((tmp_path / "runs/tiny/checkpoints").iterdir())
