"""plan: what a run will cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipkit.commands.arguments import ConfigFile, Json, Settings
from clipkit.commands.output import STDOUT, print_tables, write_json
from clipkit.errors import UserError

if TYPE_CHECKING:
    from clipkit.training.budget import Budget

GB = 1e9


def plan(
    config: ConfigFile,
    settings: Settings = None,
    gpus: Annotated[int, typer.Option(min=1, metavar="G", help="GPUs of the run.")] = 1,
    memory: Annotated[float, typer.Option(min=0.1, metavar="M", help="Memory of each, in 10^9 bytes.")] = 80.0,
    tflops: Annotated[
        float | None, typer.Option(min=0.01, metavar="T", help="Peak of each in TFLOP/s, for the time.")
    ] = None,
    utilisation: Annotated[float, typer.Option(min=0.01, max=1.0, metavar="U", help="Share of the peak.")] = 0.3,
    json_path: Json = None,
) -> None:
    """Say what a run will cost, before it costs anything.

    Parameters, FLOPs a sample, memory by part, steps, epochs, the largest batch a GPU holds, time. No data is needed.
    """
    from clipkit import config as configuration
    from clipkit.training.budget import Budget, pairs_indexed

    for option, number in (("--memory", memory * GB), ("--tflops", tflops or 0.0)):
        if not math.isfinite(number):
            raise UserError(f"{option}: should be a finite number, found {number:g}; give what one GPU has")
    checked = configuration.load(config, settings or ())
    budget = Budget(checked, gpus)
    pairs, total = pairs_indexed(checked.data), budget.flops_a_sample * checked.steps * checked.batch_size
    seconds = total / (gpus * tflops * 1e12 * utilisation) if tflops else None
    parts = budget.memory()
    found = {
        "gpus": gpus,
        "parameters": [vars(line) for line in budget.weights],
        "teacher_parameters": budget.teacher_weights,
        "flops_a_sample": budget.flops_a_sample,
        "flops": [dict(zip(("role", "count", "forward", "backward"), line)) for line in budget.flops],
        "flops_run": total,
        "memory_bytes": parts,
        "memory_bytes_total": sum(parts.values()),
        "fits": sum(parts.values()) <= memory * GB,
        "largest_rows_a_gpu": budget.largest(memory * GB),
        "rows_a_gpu": budget.rows,
        "steps": checked.steps,
        "epochs": checked.samples / pairs if pairs else None,
        "time_s": seconds,
        "context_length": budget.context,
    }
    if json_path:
        write_json(found, json_path)
    if json_path != STDOUT:
        print_tables(_tables(budget, found, memory, utilisation))


def _tables(budget: Budget, found: dict[str, Any], memory: float, utilisation: float) -> list[Any]:
    weights = [(line.part, line.learning, line.locked) for line in budget.weights]
    weights.append(("teacher (its own)", 0, budget.teacher_weights))
    work = [(role, count, f"{there / 1e9:.3f}", f"{back / 1e9:.3f}") for role, count, there, back in budget.flops]
    parts = [(part, f"{size / GB:.3f}") for part, size in found["memory_bytes"].items()]
    parts.append(("all", f"{found['memory_bytes_total'] / GB:.3f}"))
    epochs, seconds = found["epochs"], found["time_s"]
    said = f"{'fit' if found['fits'] else 'do not fit'} into {memory:g} GB; at most {found['largest_rows_a_gpu']:,}"
    run = [
        ("steps", f"{found['steps']:,}"),
        ("epochs", f"{epochs:.2f}" if epochs else "not known: the shards are not here, or not indexed yet"),
        ("pairs a GPU", f"{found['rows_a_gpu']:,} {said}"),
        ("GFLOP a sample", f"{found['flops_a_sample'] / 1e9:.2f}, terms and optimizer left out"),
        ("FLOP", f"{found['flops_run']:.2e}"),
        ("time", f"{seconds / 3600:.2f} h at {utilisation:.0%} of the peak" if seconds else "not known: give --tflops"),
        ("texts", f"taken as {found['context_length']} tokens long, the context: an upper bound for FLOPs and memory"),
    ]
    return [
        ("parameters", ["part", "learning", "locked"], weights),
        ("GFLOP a pair", ["role", "a pair", "forward", "backward"], work),
        ("GB on each GPU", ["part", "GB"], parts),
        ("run", ["", ""], run),
    ]
