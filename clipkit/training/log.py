"""What a run writes down: metrics.jsonl, skipped.jsonl, spikes.jsonl, TensorBoard, and a progress bar for people."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from clipkit import distributed
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.data.shards import Index
from clipkit.model.embeddings import Embeddings
from clipkit.objective.measures import means, measures, temperatures
from clipkit.training.optim import learning_rate
from clipkit.training.work import Work


class RunLog:
    """The meters of a run. Every rank keeps one (skips are counted on all); the main rank's writes.

    The caller says `waited()` when a batch has arrived, `step(...)` when the step is done and `evaluation(...)`
    after an evaluation, so that the share of time spent waiting for data and the samples/s are the training's own.
    """

    def __init__(self, folder: Path, config: Config, start: int):
        self._config = config
        self._writer = _Writer(folder, start, config) if distributed.is_main() else None
        peak = config.engine.peak_tflops
        self._work = Work(config, peak) if peak and self._writer else None
        self._skipped: Counter[str] = Counter()
        self._waited = 0.0
        self._mark = self._line_mark = time.perf_counter()
        self._line_step = start

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer:
            self._writer.close()

    def waited(self) -> None:
        """The batch has arrived: everything since the step before was waiting for data."""
        self._waited += time.perf_counter() - self._mark

    def due(self, step: int) -> bool:
        """Whether a line is written when `step` is done: every `log_every` steps and at the end."""
        return step % self._config.log_every == 0 or step == self._config.steps

    def step(
        self,
        step: int,
        loss: Tensor,
        terms: dict[str, Tensor],
        pulls: dict[str, float],
        norm: Tensor,
        z: Embeddings,
        batch: Batch,
        skipped_steps: int,
    ) -> None:
        """Count a finished step; where one is `due`, write a line. `pulls`: the terms' shares; `z`: this rank's.

        Of a skipped step the line holds what is finite.
        """
        self._skipped.update(reason for _, reason in batch.skipped)
        if self._config.log_samples:
            shares = distributed.gather_objects(batch.id.tolist())
            if self._writer:
                self._writer.samples(step, [id for share in shares for id in share])
        if self._writer:
            self._writer.tick(step)
        if self.due(step):
            self._line(step, loss, terms, pulls, norm, z, batch, skipped_steps)
        self._mark = time.perf_counter()

    def spike(
        self, step: int, loss: Tensor, terms: dict[str, Tensor], norm: Tensor, batch: Batch, index: Index, usual: float
    ) -> None:
        """Write down a step whose loss was far above the `usual`: the keys of the global batch, and what terms said."""
        shares = distributed.gather_objects(batch.id.tolist())
        if self._writer:
            row = {
                "loss": float(loss),
                "usual": usual,
                "grad_norm": float(norm),
                "terms": {name: float(term) for name, term in terms.items()},
                "keys": [index.where(id) for share in shares for id in share],
            }
            said = f"step {step}: loss {row['loss']:.4g} where {usual:.4g} is usual; its samples are in spikes.jsonl"
            self._writer.event(step, row, said, file="spikes")

    def skip(self, step: int, loss: Tensor, terms: dict[str, Tensor], norm: Tensor, batch: Batch, index: Index) -> None:
        """Write down a skipped step: the keys of the global batch, and which terms were not finite."""
        shares = distributed.gather_objects(batch.id.tolist())
        if self._writer:
            row = {
                "loss": str(float(loss)),
                "grad_norm": str(float(norm)),
                "terms": [name for name, term in terms.items() if not math.isfinite(float(term))],
                "keys": [index.where(id) for share in shares for id in share],
            }
            self._writer.event(step, row, f"step {step} skipped: loss {row['loss']}, gradient norm {row['grad_norm']}")

    def roll_back(self, step: int, to: int) -> None:
        """Write down that after `step` the run went back to the checkpoint of step `to`."""
        if self._writer:
            self._writer.event(step, {"back_to": to}, f"step {step}: back to the weights of step {to}")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write the headline numbers of an evaluation; its time is not the training's."""
        if self._writer:
            self._writer.write(step, {"evaluation": values})
        pause = time.perf_counter() - self._mark
        self._line_mark += pause
        self._mark += pause

    def knows(self, step: int) -> bool:
        """Whether the evaluation after this step is written down. All ranks ask together."""
        return distributed.gather_objects(self._writer is not None and self._writer.knows(step))[0]

    def _line(
        self,
        step: int,
        loss: Tensor,
        terms: dict[str, Tensor],
        pulls: dict[str, float],
        norm: Tensor,
        z: Embeddings,
        batch: Batch,
        skipped_steps: int,
    ) -> None:
        skipped: Counter[str] = Counter()
        ranks = distributed.gather_objects((self._skipped, measures(z, batch.kinds), memory_bytes()))
        for counts, _, _ in ranks:
            skipped.update(counts)
        now = time.perf_counter()
        elapsed = max(now - self._line_mark, 1e-9)
        rate = (step - self._line_step) * self._config.batch_size / elapsed
        scale, found = float(torch.as_tensor(z.scale).detach()), means([found for _, found, _ in ranks])
        row = {
            "loss": float(loss),
            **{f"term/{name}": float(term) for name, term in terms.items()},
            **{f"pull/{name}": share for name, share in pulls.items()},
            "lr": learning_rate(step - 1, self._config),
            "grad_norm": float(norm),
            "scale": scale,
            **temperatures(self._config.objective, scale, found["cosine/positive"]),
            **found,
            "data_wait": self._waited / elapsed,
            "samples_per_s": rate,
            "memory_bytes": max(used for _, _, used in ranks),
            **({"mfu": self._work.utilisation(rate, batch)} if self._work else {}),
            **{f"skipped/{reason}": count for reason, count in skipped.items()},
            **({"skipped_steps": skipped_steps} if skipped_steps else {}),
        }
        self._waited, self._line_mark, self._line_step = 0.0, now, step
        if self._writer:
            self._writer.write(step, {name: value for name, value in row.items() if math.isfinite(value)})


class _Writer:
    """Files and the progress bar. Lines beyond `start`, left by a killed run, are dropped."""

    def __init__(self, folder: Path, start: int, config: Config):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._file = _continued(folder / "metrics.jsonl", start)
        self._samples = _continued(folder / "samples.jsonl", start) if config.log_samples else None
        self._events = {name: folder / f"{name}.jsonl" for name in ("skipped", "spikes")}
        for events in self._events.values():  # hardly ever written to: opened at each line
            if events.is_file():
                _continued(events, start).close()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
        self._batch_size = config.batch_size
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(config.name, total=config.steps, completed=start, shown="")
        self._bar.start()

    def close(self) -> None:
        self._bar.stop()
        self._file.close()
        if self._samples:
            self._samples.close()
        self._board.close()

    def tick(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def write(self, step: int, row: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "samples": step * self._batch_size, **row}) + "\n")
        self._file.flush()
        for name, value in (row.get("evaluation") or row).items():
            self._board.add_scalar(f"evaluation/{name}" if "evaluation" in row else name, value, step)
        if "loss" in row:
            terms = " ".join(f"{k.removeprefix('term/')} {v:.3f}" for k, v in row.items() if k.startswith("term/"))
            self._bar.update(self._task, shown=f"loss {row['loss']:.3f} ({terms}) {row['samples_per_s']:.0f} samples/s")

    def knows(self, step: int) -> bool:
        rows = map(json.loads, Path(self._file.name).read_text().splitlines())
        return any(row["step"] == step and "evaluation" in row for row in rows)

    def event(self, step: int, row: dict[str, Any], said: str, file: str = "skipped") -> None:
        with self._events[file].open("a") as lines:
            lines.write(json.dumps({"step": step, **row}) + "\n")
        self._bar.console.print(said, highlight=False, soft_wrap=True)

    def samples(self, step: int, ids: list[int]) -> None:
        assert self._samples
        self._samples.write(json.dumps({"step": step, "ids": ids}) + "\n")
        self._samples.flush()


def memory_bytes() -> int:
    """The most memory that this rank has used so far: on its GPU, else of the machine's (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def _continued(path: Path, step: int) -> TextIO:
    """A log open for more lines, without those beyond `step` and a last one that was cut off."""
    if path.is_file():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        os.replace(temporary, path)
    return path.open("a")
