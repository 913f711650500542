"""What a checkpoint costs a step at ViT-B/32 size: waiting for the file, or for a copy made beside the next step."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from startup import processor
from step import CONTEXT, NEGATIVES, SIZE, TERMS, texts

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.data.tokenize import Tokenizer
from clipkit.model.dual_encoder import build
from clipkit.model.teacher import Teacher
from clipkit.objective import Objective
from clipkit.training.checkpoint import Checkpoints
from clipkit.training.engine import Engine
from clipkit.training.guard import Guard
from clipkit.training.optim import build_optimizer

BATCHES = (8, 32)
"""A short step and a long one: the shorter, the less there is to hide a save behind."""
RESULT = Path(__file__).parent / "results" / "checkpoint.json"


class _Plan:
    """As much of a plan as a checkpoint asks for."""

    def position(self, step: int) -> dict[str, int]:
        return {"step": step}


Step = Callable[[int | None], dict[str, float]]
"""A step of the loop that may save what was before it; the seconds that it took and waited."""


def run(folder: Path, name: str, n: int, beside: bool) -> tuple[Step, Checkpoints, int]:
    """A run that takes single steps, what saves it, and how many bytes that saves."""
    tree = {"batch_size": n, "samples": 8000 * n, "model": {"name": name}, "teacher": {"kind": "ema"}, "keep": 1}
    tree |= {"data": {"negatives": NEGATIVES}, "objective": TERMS, "optim": {"lr": 1e-6}, "save_async": beside}
    config = configuration.validate(tree)
    engine, model = Engine(config), build(config.model).train()
    teacher = Teacher(model, config.teacher, config.steps)
    engine.prepare(model, build_optimizer(model, config.optim))
    objective, guard, plan = Objective(config.objective), Guard(config.guard), _Plan()
    checkpoints = Checkpoints(folder, config, plan, engine, teacher, objective, guard)  # type: ignore[arg-type]
    tokens = Tokenizer()(texts(n * (1 + NEGATIVES)))
    batch = Batch(
        text=tokens[:n],
        id=torch.arange(n),
        group=torch.arange(n),
        image=torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8),
        negative_text=tokens[n:].unflatten(0, (n, NEGATIVES)),
        valid=torch.ones(n, NEGATIVES, dtype=torch.bool),
    )

    def step(save: int | None) -> dict[str, float]:
        began = time.perf_counter()
        if save is not None:
            checkpoints.save(save)
        saved = time.perf_counter()
        z = engine.embed(batch)
        z.teacher = teacher.embed(batch)
        loss, _ = objective(z.world())
        engine.backward(loss)
        computed = time.perf_counter()
        checkpoints.settle()
        settled = time.perf_counter()
        norm = engine.clip()
        assert guard.passes(norm, loss)
        engine.update()
        teacher.update(engine.bare, 1)
        ended = time.perf_counter()
        return {"step": ended - began, "waited": saved - began + settled - computed}

    step(None)
    size = sum(x.nbytes for table in checkpoints._tables().values() for x in table.values())
    return step, checkpoints, size


def measure(beside: bool, batch: int, rounds: int) -> dict[str, Any]:
    """Medians over `rounds` of a step without a save, of one that begins with one, and of the one after it."""
    with tempfile.TemporaryDirectory() as folder:
        step, checkpoints, size = run(Path(folder), "ViT-B-32", batch, beside)
        plain, saving, after = [], [], []
        for number in range(rounds):
            plain.append(step(None))
            saving.append(step(number))
            after.append(step(None))
        checkpoints.finish()  # before the folder goes

        def median(steps: list[dict[str, float]], what: str) -> float:
            return statistics.median(one[what] for one in steps)

        usual, waited = median(plain, "step"), median(saving, "waited")
        return {
            "GB": round(size / 1e9, 2),
            "seconds a step": round(usual, 2),
            "seconds a step that saves": round(median(saving, "step"), 2),
            "seconds the step after": round(median(after, "step"), 2),
            "seconds waited": round(waited, 3),
            "waited, share of a step": round(waited / usual, 4),
        }


def main(rounds: int = 3) -> None:
    """Measure, print, write."""
    rows: dict[str, dict[str, Any]] = {}
    for batch in BATCHES:
        for name, beside in (("beside", True), ("waiting", False)):
            row = rows.setdefault(f"batch {batch}", {})[name] = measure(beside, batch, rounds)
            print(f"{batch:4} {name:10}" + "".join(f"{column} {value}   " for column, value in row.items()), flush=True)
    result = {
        "date": str(date.today()),
        "hardware": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__},
        "model": "ViT-B-32, EMA teacher, AdamW",
        "negatives": NEGATIVES,
        "context": CONTEXT,
        "rounds": rounds,
        "save_async": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
