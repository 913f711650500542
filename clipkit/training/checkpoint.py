"""Whole checkpoints, read alike by every engine and world size.

    checkpoints/step_00000200/
      model.json  model.safetensors      the student, loadable by `clipkit.load` alone
      teacher.safetensors                when there is one with weights of its own
      terms.safetensors                  when there is one that remembers something
      optimizer.safetensors              moments by parameter name, in full, whatever the engine shards
      state.json                         step, position in the data, what the guard counted, the loss scale, config
      rng_0.safetensors …                one per rank

With `save_form: sharded` each rank writes model-00000-of-00002.safetensors and its like, with the numbers that it holds
(`clipkit.model.pieces`): weights and moments are not gathered, and the ranks write side by side.

Everything is written into a hidden folder first and renamed when complete, so a killed save, or a power cut, leaves no
half checkpoint. Nothing is ever unpickled. With `save_async` a thread writes from a copy while training goes on; the
copy itself is made while the next step computes its gradient, as weights, moments and teacher stand still until then.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from clipkit import distributed
from clipkit.config import Config
from clipkit.data.mixture import Mixture
from clipkit.data.plan import Plan
from clipkit.errors import UserError
from clipkit.model.load import description, save_description, save_parts
from clipkit.model.pieces import Layout, load_table, needed_table, save_pieces
from clipkit.model.spec import whole_checkpoints
from clipkit.model.tables import write_table
from clipkit.model.teacher import Teacher
from clipkit.objective import Objective
from clipkit.training.engine import Engine
from clipkit.training.guard import Guard
from clipkit.training.meeting import Meeting
from clipkit.training.mirror import Mirror
from clipkit.training.optim import MOMENTS
from clipkit.training.retention import kept

BESIDE_BYTES = 1_000_000
"""Room for everything small: headers, random states, the config."""


@dataclass
class Checkpoints:
    """Writes down and brings back all that a run is made of. Every rank calls each method, together."""

    folder: Path
    """The run's."""
    config: Config
    plan: Plan | Mixture
    engine: Engine
    teacher: Teacher | None
    objective: Objective
    guard: Guard
    mirror: Mirror | None = None

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._under_way: tuple[Path, Future[None] | None] | None = None
        """The checkpoint being written, and at ranks that write what writes it."""
        self._room: dict[str, dict[str, Tensor]] = {}
        """With `save_async`, of tables and tensors: the copies of the last save, which the next one writes over."""
        self._copied = Event()
        self._copied.set()
        self._meeting: Meeting | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        if self._meeting:
            self._meeting.leave()  # after an error a rank may never write its part
        self._thread.shutdown()  # or it would write beside whoever trains next in this process

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`; with `save_async` begin to, when the one before is whole.

        Raises UserError when this one, or the one before, cannot be written; nothing half is left then.
        """
        self.finish()
        final = self.folder / "checkpoints" / f"step_{step:08d}"
        partial = _partial(final)
        tables, layouts = self._pieces() if self._sharded else (self._tables(), {})
        state = self._state(step, [name for name, table in tables.items() if table])
        parts = _Parts(description(self.engine.bare), state, tables, layouts)
        needed = distributed.gather_objects(_bytes(tables))
        self._together(final, lambda: self._prepare(partial, sum(needed) if self._sharded else needed[0]))
        self._together(final, lambda: _write_random_state(partial))
        self._meeting = Meeting(self.config.engine.timeout_s) if self._sharded else None
        future = None
        if distributed.is_main() or self._sharded:
            self._copied.clear()
            future = self._thread.submit(self._write, final, parts)
        self._under_way = final, future
        self.guard.saved()
        if not self.config.save_async:
            self.finish()

    def settle(self) -> None:
        """Wait until the weights may move: what is being saved is copied."""
        self._copied.wait()

    def finish(self) -> None:
        """Wait until the checkpoint under way is whole. Raises UserError, on all ranks, where it cannot be written."""
        if self._under_way:
            final, future = self._under_way
            self._under_way = None
            self._together(final, future.result if future else lambda: None)

    def restore(self) -> int:
        """Bring everything back to the newest checkpoint, of the run or its mirror; returns its step, 0 without one."""
        if self.mirror:
            self.mirror.fetch(self.folder / "checkpoints")
        if distributed.is_main():
            for half in self.folder.glob("checkpoints/.step_*.partial"):  # a killed run's
                shutil.rmtree(half, ignore_errors=True)
        distributed.barrier()
        whole = whole_checkpoints(self.folder)
        if not whole:
            return 0
        last = whole[-1]
        state = _state(last)
        if state["step"] > self.config.steps:
            raise UserError(
                f"{last}: lies behind the run's end: samples={self.config.samples} is {self.config.steps} steps; "
                f"resume with samples={state['step'] * self.config.batch_size} or more"
            )
        try:
            step = self.plan.step_of(state["position"])
        except UserError as error:
            raise UserError(
                f"{last}: {error}; "
                "restore the shards, or start a new run that begins from this checkpoint with model.start"
            ) from None
        self.guard.load_state(state["guard"])
        self.engine.load_state(state.get("engine", {}))
        self._load(last)
        return step

    def roll_back(self) -> int:
        """Bring all but the position in the data back to the newest checkpoint from before the skipped steps.

        Returns its step. Raises UserError when there is none, or when the run has gone back to it before.
        """
        self.finish()
        states = {path: _state(path) for path in whole_checkpoints(self.folder)}
        before = [path for path, state in states.items() if self.guard.trusts(state["guard"])]
        self.guard.go_back(states[before[-1]]["guard"]["updates"] if before else None)
        self._load(before[-1])
        return states[before[-1]]["step"]

    @property
    def _sharded(self) -> bool:
        return self.config.save_form == "sharded"

    def _tables(self) -> dict[str, dict[str, Tensor]]:
        """All tensors by file name; every rank takes part in gathering what engines divide.

        What moves in a forward pass (running statistics, what terms remember) is a copy, the rest the thing itself.
        """
        model = self.engine.weights()
        tables = {"model": model | {name: x.clone() for name, x in self.engine.bare.named_buffers() if name in model}}
        tables["optimizer"] = self.engine.moments() if self.guard.updates else {}
        if self.teacher and (own := self.teacher.state()):
            tables["teacher"] = own
        return tables | self._remembered()

    def _pieces(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Layout]]:
        """What this rank writes down, by file name, and where it belongs; what terms remember the main rank, whole."""
        pieces = {"model": self.engine.weight_pieces()}
        pieces["optimizer"] = self.engine.moment_pieces() if self.guard.updates else {}
        if self.teacher and (own := self.teacher.pieces()):
            pieces["teacher"] = own
        tables = {name: {key: piece.values for key, piece in table.items()} for name, table in pieces.items()}
        model = tables["model"]
        model |= {name: model[name].clone() for name, _ in self.engine.bare.named_buffers() if name in model}
        tables |= self._remembered()
        return tables, {
            name: {key: (piece.start, piece.shape) for key, piece in table.items()} for name, table in pieces.items()
        }

    def _remembered(self) -> dict[str, dict[str, Tensor]]:
        remembered = {name: x.clone() for name, x in self.objective.state().items()}
        return {"terms": remembered} if remembered else {}

    def _state(self, step: int, tables: list[str]) -> dict[str, Any]:
        return {
            "step": step,
            "position": self.plan.position(step),
            "guard": self.guard.state(),
            "engine": self.engine.state(),
            "tables": tables,
            "config": self.config.model_dump(mode="json"),
        }

    def _together(self, final: Path, work: Callable[[], None]) -> None:
        """Do this rank's part of the work; where a rank cannot write, all raise the same UserError."""
        problem = ""
        try:
            work()
        except (OSError, SafetensorError) as error:
            problem = str(error)
        problems = [found for found in distributed.gather_objects(problem) if found]
        if problems:
            if distributed.is_main():
                shutil.rmtree(_partial(final), ignore_errors=True)
            whole = whole_checkpoints(self.folder)
            stays = f"{whole[-1].name} stays as it was" if whole else "no checkpoint from before"
            raise UserError(f"{final}: cannot be written: {problems[0]}; {stays}; make room and go on with --resume")

    def _prepare(self, partial: Path, needed: int) -> None:
        if not distributed.is_main():
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        needed += BESIDE_BYTES
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(f"it takes {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free")

    def _write(self, final: Path, parts: _Parts) -> None:
        """In the thread, at ranks that write: all but the random states, which lie there already."""
        partial = _partial(final)
        if meeting := self._meeting:
            try:
                self._write_tables(partial, parts)
            except Exception as error:
                meeting.tell(str(error) or repr(error))
                raise
            meeting.tell("")
            if not distributed.is_main():
                return
            if problem := meeting.wait():
                raise OSError(problem)
            save_description(parts.about, partial)
        else:
            self._write_tables(partial, parts)
        self._complete(final, parts)

    def _write_tables(self, partial: Path, parts: _Parts) -> None:
        tables = parts.tables
        try:
            if self.config.save_async:
                self._room = {name: host_copy(x, parts.ready, self._room.get(name, {})) for name, x in tables.items()}
                tables = self._room
        finally:
            self._copied.set()
        for name, table in tables.items():
            table = table if self.config.save_async else host_copy(table, parts.ready, {})  # then one at a time
            if name in parts.layouts:
                save_pieces(table, parts.layouts[name], partial, name)
            elif name == "model":
                save_parts(table, parts.about, partial)
            else:
                write_table(table, partial / f"{name}.safetensors")

    def _complete(self, final: Path, parts: _Parts) -> None:
        """At the main rank, when all tables are written: from here on the checkpoint counts."""
        partial = _partial(final)
        (partial / "state.json").write_text(json.dumps(parts.state, indent=1))
        for path in (*partial.iterdir(), partial):
            _to_disk(path)  # before the name, or a power cut leaves a whole name with half files
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _to_disk(final.parent)
        prune(self.folder, self.config, self.mirror)
        if self.mirror:
            self.mirror.push(final)

    def _load(self, path: Path) -> None:
        state = _state(path)
        for name in state["tables"]:
            needed_table(path, name)
        self.engine.load_weights(path)
        if self.teacher:
            self.teacher.load_state(load_table(path, "teacher"))
        self.objective.load_state(load_table(path, "terms"))
        self.engine.load_moments(_read_moments(path, self.config.optim.kind), self.guard.updates)
        # A rank that the saving world did not have takes the first one's: they draw alike.
        own = f"rng_{distributed.rank()}"
        torch.set_rng_state(needed_table(path, own if (path / f"{own}.safetensors").is_file() else "rng_0")["torch"])


class _Parts:
    """What a checkpoint is made of: what model.json and state.json say, and tables by file name, not copied yet.

    `layouts`: where the pieces of the sharded form belong; empty in the full one.
    """

    def __init__(
        self,
        about: dict[str, Any],
        state: dict[str, Any],
        tables: dict[str, dict[str, Tensor]],
        layouts: dict[str, Layout],
    ):
        self.about, self.state, self.tables, self.layouts = about, state, tables, layouts
        self.ready: Any = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        """On a GPU: when all that was asked for before is done."""


def host_copy(table: dict[str, Tensor], ready: Any, room: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host that share no storage: in `room`, earlier copies, where it has them (new memory costs more).

    On a GPU beside what it computes, from the event `ready` on.
    """
    copies = {}
    for name, x in table.items():
        old = room.get(name)
        fits = old is not None and (old.shape, old.dtype) == (x.shape, x.dtype)
        copies[name] = old if fits else torch.empty(x.shape, dtype=x.dtype, pin_memory=ready is not None)
    beside: Any = None if ready is None else torch.cuda.Stream()
    if beside:
        beside.wait_event(ready)
    with torch.cuda.stream(beside):  # None: at once
        for name, x in table.items():
            copies[name].copy_(x.detach(), non_blocking=True)
    if beside:
        beside.synchronize()
    return copies


def _bytes(tables: dict[str, dict[str, Tensor]]) -> int:
    return sum(x.numel() * x.element_size() for table in tables.values() for x in table.values())


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _to_disk(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_random_state(partial: Path) -> None:
    write_table({"torch": torch.get_rng_state()}, partial / f"rng_{distributed.rank()}.safetensors")


def prune(folder: Path, config: Config, mirror: Mirror | None = None) -> None:
    """Remove a run's checkpoints that need not stay, but for one that is just being copied."""
    whole = whole_checkpoints(folder)
    stay = kept([path.name for path in whole], config)
    for old in whole:
        if old.name not in stay and not (mirror and mirror.reads(old)):
            shutil.rmtree(old)


def _state(path: Path) -> dict[str, Any]:
    """state.json. Raises UserError where it is missing or damaged."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: state.json cannot be read ({error}); remove this folder to go on from the checkpoint before it"
        ) from None


def _read_moments(path: Path, kind: str) -> Mapping[str, Tensor]:
    """The saved moments by name. Raises UserError when another kind of optimizer wrote them."""
    moments = load_table(path, "optimizer")
    found = sorted({name.partition(".")[0] for name in moments})
    if found and found != sorted(MOMENTS[kind]):
        wrote = next((other for other, keys in MOMENTS.items() if sorted(keys) == found), "another kind")
        raise UserError(
            f"{path}: holds the moments of {wrote}, and optim.kind is {kind}; resume with optim.kind={wrote}, "
            "or start a new run that begins from this checkpoint with model.start"
        )
    return moments
