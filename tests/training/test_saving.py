"""Checkpoints written while training goes on: the same bytes, one at a time, whole or not at all; and their mirror."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from clipkit.config import Config
from clipkit.errors import UserError
from clipkit.training import checkpoint as saving
from clipkit.training import mirror as mirroring
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from tests.training.runs import losses


def contents(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint but state.json, which names the run."""
    files = sorted(file for file in run.glob("checkpoints/*/*") if file.name != "state.json")
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def config(tree: dict, **settings: Any) -> Config:
    return Config.model_validate(tree | {"samples": 64, "save_every": 16, "keep": 9} | settings)


def test_written_beside_training_are_the_same_bytes(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when copying begins as late as it may: the next step has its gradient, and its batch norms have moved."""
    tiny_tree["model"] |= {"image": {"conv": [[8, 2], [16, 2]], "size": 16}}
    tiny_tree["objective"] |= {"rank": {}}
    waited = train(config(tiny_tree, name="waited", save_async=False))
    computed, copy, backward = Event(), saving.host_copy, Engine.backward

    def late(*table: Any) -> Any:
        computed.wait(timeout=5)
        return copy(*table)

    def signal(*step: Any) -> None:
        backward(*step)
        computed.set()

    with monkeypatch.context() as patch:
        patch.setattr(saving, "host_copy", late)
        patch.setattr(Engine, "backward", signal)
        save = saving.Checkpoints.save
        patch.setattr(saving.Checkpoints, "save", lambda *step: (computed.clear(), save(*step)))
        beside = train(config(tiny_tree, name="beside"))
    assert len(contents(waited)) == 4 * 6 and contents(waited) == contents(beside)


def test_a_save_that_fails_is_told_at_the_next(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    write = saving.save_parts

    def failing(state: Any, about: Any, folder: Path) -> None:
        if "step_00000002" in folder.name:
            raise OSError("the disk is gone")
        write(state, about, folder)

    monkeypatch.setattr(saving, "save_parts", failing)
    run = config(tiny_tree)
    with pytest.raises(UserError, match="step_00000002: cannot be written: the disk is gone; step_00000001 stays"):
        train(run)
    assert [path.name for path in (run.run_folder / "checkpoints").iterdir()] == ["step_00000001"]
    assert len(losses(run.run_folder)) == 3  # the next save was due there


def test_one_that_fails_last_is_told_at_the_end(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*parts: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(saving, "save_parts", failing)
    with pytest.raises(UserError, match="step_00000004: cannot be written: .* no checkpoint from before"):
        train(config(tiny_tree, save_every=0))


@pytest.mark.gpu
def test_copies_beside_what_a_gpu_computes() -> None:
    x = torch.randn(64, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    ready = torch.cuda.current_stream().record_event()
    copied = saving.host_copy({"x": x}, ready, {})["x"]
    assert copied.device.type == "cpu" and copied.is_contiguous() and torch.equal(copied, x.cpu())


def test_copies_go_where_the_last_ones_were() -> None:
    """Into their memory where it fits; a table that has grown or changed gets new memory for that."""
    first = saving.host_copy({"a": torch.zeros(3), "b": torch.zeros(2), "gone": torch.zeros(1)}, None, {})
    table = {"a": torch.arange(3.0), "b": torch.arange(4.0), "new": torch.ones(2)}
    second = saving.host_copy(table, None, first)
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert all(torch.equal(second[name], x) and second[name].data_ptr() != x.data_ptr() for name, x in table.items())
    assert second.keys() == table.keys()


def test_the_disk_has_all_before_the_name_says_so(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    to_disk, replace = saving._to_disk, saving.os.replace

    def renamed(partial: Path, final: Path) -> None:
        assert {path.name for path in Path(partial).iterdir()} < set(done)
        done.append("renamed")
        replace(partial, final)

    monkeypatch.setattr(saving, "_to_disk", lambda path: (to_disk(path), done.append(path.name)))
    with monkeypatch.context() as patch:
        patch.setattr(
            saving.os, "replace", lambda *paths: renamed(*paths) if "step_" in str(paths[1])[-14:] else replace(*paths)
        )
        train(config(tiny_tree, samples=32, save_every=0))
    assert done[-3:] == [".step_00000002.partial", "renamed", "checkpoints"]


def test_some_stay_for_good(tiny_tree: dict) -> None:
    """The newest, and the first behind every third step: also in what is copied elsewhere."""
    mirror = tiny_tree["out"].replace("runs", "mirror")
    run = config(tiny_tree, samples=16 * 9, save_every=32, keep=1, keep_every=48, mirror=mirror)
    train(run)
    for folder in (run.run_folder / "checkpoints", Path(mirror.format(name="tiny"))):
        assert sorted(path.name[-1] for path in folder.iterdir()) == ["4", "6", "9"], folder


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[MemoryFileSystem]]:
    """`flaky://`: files in memory, behind a store that refuses the next `refused` uploads."""

    class Flaky(MemoryFileSystem):
        protocol = "flaky"
        store: dict[str, Any] = {}
        pseudo_dirs: list[str] = [""]
        refused = 0
        room = 10**9

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.replace("flaky://", "memory://"))

        def put_file(self, *words: Any, **more: Any) -> None:
            if Flaky.refused:
                Flaky.refused -= 1
                raise ConnectionError("reset by peer")
            super().put_file(*words, **more)
            if sum(file.size for file in Flaky.store.values()) > Flaky.room:
                raise OSError("no room")

    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(mirroring, "PAUSE_S", 0.0)
    yield Flaky


def names(store: type[MemoryFileSystem]) -> set[str]:
    return {path.split("/")[-2] for path in store.store if path.endswith("state.json")}


def test_a_run_goes_on_from_its_mirror(tiny_tree: dict, store: Any) -> None:
    """With its folder lost, or with one that is older: the same bits as a run left in peace. Old copies go."""
    peace = contents(train(config(tiny_tree, name="peace", keep=2)))
    run = config(tiny_tree, name="lost", mirror="flaky://runs/{name}", keep=2)
    checkpoints = train(run) / "checkpoints"
    assert names(store) == {"step_00000003", "step_00000004"}
    for older in (True, False):
        store().rm("/runs/lost/step_00000004", recursive=True)
        shutil.rmtree(checkpoints / "step_00000004")
        newest = checkpoints / "step_00000003"
        if older:
            newest.rename(checkpoints / "step_00000001")
        else:
            shutil.rmtree(run.run_folder)
        train(run, resume=True)
        assert {file: data for file, data in contents(run.run_folder).items() if "00001" not in file} == peace
        assert names(store) == {"step_00000003", "step_00000004"}


def test_what_fails_is_tried_again_and_ends_nothing(tiny_tree: dict, store: Any, capfd: Any) -> None:
    store.refused = 2
    run = train(config(tiny_tree, save_every=0, mirror="flaky://there"))
    assert names(store) == {"step_00000004"} and "mirror" not in capfd.readouterr().err
    store.refused = 10**6
    train(config(tiny_tree, save_every=0, mirror="flaky://other", name="other"))
    said = capfd.readouterr().err
    assert "mirror: step_00000004 could not be copied to flaky://other, tried 4 times" in said
    assert "reset by peer" in said and (run / "checkpoints/step_00000004/state.json").is_file()


def test_what_is_half_takes_no_room(tiny_tree: dict, store: Any, capfd: Any) -> None:
    """Neither a copy that was given up at its very last file, nor one that a killed run left."""
    run = config(tiny_tree, samples=32, keep=1, mirror="flaky://full")
    checkpoints = train(run) / "checkpoints"
    second = shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000003")
    store().pipe_file("/full/step_00000001/model.safetensors", b"half")
    store.room = sum(file.size for file in store.store.values()) * 2 - 5
    mirror = mirroring.Mirror(run)
    mirror.push(second)
    mirror.close()
    said = capfd.readouterr().err
    assert "step_00000003 could not be copied to flaky://full, tried 4 times: OSError: no room" in said
    assert {path.split("/")[-2] for path in store.store} == names(store) == {"step_00000002"}
    mirror = mirroring.Mirror(run)
    mirror.push(second)
    mirror.close()
    assert names(store) == {"step_00000003"} and not capfd.readouterr().err


def test_old_copies_that_stay_take_no_new_one_along(tiny_tree: dict, store: Any, capfd: Any, monkeypatch: Any) -> None:
    def refuse(mirror: mirroring.Mirror) -> None:
        raise UserError("not allowed")

    monkeypatch.setattr(mirroring.Mirror, "_clear", refuse)
    train(config(tiny_tree, save_every=0, mirror="flaky://there"))
    said = capfd.readouterr().err
    assert "mirror: what is old could not be removed from flaky://there, tried 4 times: not allowed" in said
    assert names(store) == {"step_00000004"}


def test_a_new_run_does_not_take_over_a_mirror(tiny_tree: dict, store: Any) -> None:
    """Its copies would be older than what lies there, and make way; a run resumed would get the other's weights."""
    run = config(tiny_tree, mirror="flaky://there")
    shutil.rmtree(train(run))
    copies = dict(store.store)
    message = "mirror: flaky://there: holds a run's checkpoints already, at last step_00000004; continue that run with"
    with pytest.raises(UserError, match=message):
        train(config(tiny_tree, samples=32, mirror="flaky://there"))
    assert store.store == copies and not (run.run_folder / "metrics.jsonl").exists()
    train(config(tiny_tree, samples=32, mirror="flaky://else"))
    train(config(tiny_tree, name="other", mirror="flaky://there"), resume=True)
    assert names(store) == {f"step_0000000{number}" for number in range(1, 5)}


def test_a_place_that_cannot_be_written(tiny_tree: dict, tmp_path: Path, capfd: Any) -> None:
    """Is told before training; a run that has checkpoints goes on without."""
    (tmp_path / "file").write_text("kept")
    run = config(tiny_tree, save_every=0, samples=32, mirror=str(tmp_path / "file"))
    for resume in (False, True):
        with pytest.raises(
            UserError, match="mirror: .*/file: cannot be used: FileExistsError: .*; mend that, or choose"
        ):
            train(run, resume=resume)
    assert not (run.run_folder / "metrics.jsonl").exists()
    train(run.model_copy(update={"mirror": ""}))
    train(run, resume=True)
    assert "cannot be used: FileExistsError" in capfd.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_runs_own_checkpoints_are_no_mirror(tiny_tree: dict) -> None:
    """Also where nothing has checked the config before."""
    with pytest.raises(UserError, match="is, holds or lies in the run's own checkpoints"):
        train(config(tiny_tree, mirror=tiny_tree["out"] + "/checkpoints"))


def test_a_mirror_that_cannot_be_read(tiny_tree: dict, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    """No way to begin a lost run, but none to end one whose folder is there."""

    def refuse(mirror: mirroring.Mirror) -> list[str]:
        raise UserError("not allowed")

    monkeypatch.setattr(mirroring.Mirror, "_whole", refuse)
    run = config(tiny_tree, save_every=0, samples=32, mirror=str(tmp_path / "mirror"))
    with pytest.raises(UserError, match="mirror: .*mirror: cannot be used: not allowed"):
        train(run, resume=True)
    (run.run_folder / "checkpoints/step_00000001").mkdir(parents=True)
    mirroring.Mirror(run).fetch(run.run_folder / "checkpoints")
    said = capfd.readouterr().err
    assert "cannot be used: not allowed; mend that, or choose another mirror=; going on from step_00000001" in said


def test_a_store_that_is_not_there_is_told_before_training(tiny_tree: dict) -> None:
    with pytest.raises(UserError, match="nowhere"):
        train(config(tiny_tree, mirror="nowhere://x"))
