"""Time and memory of the contrastive loss, forward and backward: clipkit in tiles, clipkit's matrix, and open_clip's.

python perf/loss.py [--small] [--huge]    prints, and writes perf/results/loss.json (loss_cuda.json where a GPU is)

Width 512, fp32, random embeddings; every form in turn, in one process, and the median of the rounds. Memory is the peak
above what was there before, with the gradients of the embeddings. With negatives, open_clip's form is its ClipLoss
with the negatives' logits beside those of the captions, as NegCLIP and DeGLA have it. `--huge` adds 65,536 pairs
(minutes on a CPU); `--small` leaves out all from 16,384 on and writes nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from open_clip import ClipLoss
from startup import processor
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clipkit import Embeddings
from clipkit.objective import TERMS, tables

RESULTS = Path(__file__).parent / "results"
WIDTH = 512
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = ("tiles", "matrix", "open_clip")


def infonce(tiled_from: float) -> Callable[[Embeddings], Tensor]:
    """clipkit's term with another threshold."""

    def run(z: Embeddings) -> Tensor:
        before, tables.TILED_FROM = tables.TILED_FROM, tiled_from
        try:
            return TERMS["infonce"](z)
        finally:
            tables.TILED_FROM = before

    return run


def peer(z: Embeddings) -> Tensor:
    """open_clip's ClipLoss; with negative captions, these are further columns of the images' logits."""
    if z.negative_text is None:
        return ClipLoss()(z.image, z.text, z.scale)
    texts = torch.cat([z.text, z.negative_text.flatten(0, 1)])
    labels = torch.arange(len(z), device=DEVICE)
    images = cross_entropy(z.scale * z.image @ texts.T, labels)
    return (images + cross_entropy(z.scale * z.text @ z.image.T, labels)) / 2


LOSSES = {"tiles": infonce(0), "matrix": infonce(float("inf")), "open_clip": peer}


def pairs(n: int, k: int, dtype: torch.dtype, captions: int) -> Embeddings:
    """Random unit vectors; `captions` pairs share a picture."""
    g = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        x = normalize(torch.randn(*shape, WIDTH, generator=g), dim=-1)
        return x.to(DEVICE, dtype).requires_grad_()

    scale = torch.tensor(30.0, device=DEVICE, requires_grad=True)
    group = torch.arange(n, device=DEVICE) // captions
    return Embeddings(unit(n), unit(n), unit(n, k) if k else None, group=group, scale=scale)


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """MiB above what is there now."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    kilobytes = _status("VmRSS")
    yield lambda: (_status("VmHWM") - kilobytes) / 2**10


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def once(form: str, z: Embeddings) -> tuple[float, float, float]:
    """Seconds, MiB and the loss of one forward and backward."""
    leaves = [x for x in (z.image, z.text, z.negative_text, z.scale) if isinstance(x, Tensor)]
    with peak() as mebibytes:
        began = time.perf_counter()
        loss = LOSSES[form](z)
        loss.backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        took, most = time.perf_counter() - began, mebibytes()
    for leaf in leaves:
        leaf.grad = None
    return took, most, loss.item()


def measure(n: int, k: int, forms: tuple[str, ...], rounds: int, dtype: torch.dtype, captions: int) -> dict[str, float]:
    """One row of results."""
    z = pairs(n, k, dtype, captions)
    seen: dict[str, list[tuple[float, float, float]]] = {form: [] for form in forms}
    for _ in range(rounds):
        for form in forms:
            seen[form].append(once(form, z))
    row: dict[str, float] = {}
    for form, results in seen.items():
        row[f"{form}_s"] = round(statistics.median(x[0] for x in results), 4)
        row[f"{form}_MiB"] = round(max(x[1] for x in results))
    for form in forms[1:]:
        row[f"tiles/{form}"] = round(row["tiles_s"] / row[f"{form}_s"], 3)
    for form, results in seen.items():
        row[f"{form}_loss"] = round(results[0][2], 6)
    return row


def sizes(small: bool, huge: bool) -> Iterator[tuple[str, tuple[int, int, tuple[str, ...], int, torch.dtype, int]]]:
    """What is measured, and how often."""
    full, half = torch.float32, torch.bfloat16
    yield "warm-up", (1024, 1, FORMS, 2, full, 1)
    for n, k in ((256, 0), (512, 0), (1024, 0), (256, 4), (512, 4), (1024, 4)):
        yield f"{n} pairs, {k} negatives", (n, k, FORMS, 7, full, 1)
    yield "4096 pairs, 0 negatives", (4096, 0, FORMS, 3, full, 1)
    yield "4096 pairs, 0 negatives, five captions a picture", (4096, 0, ("tiles", "matrix"), 3, full, 5)
    yield "4096 pairs, 0 negatives, bf16", (4096, 0, FORMS, 3, half, 1)
    if not small:
        yield "8192 pairs, 4 negatives", (8192, 4, ("tiles", "open_clip"), 2, full, 1)
        yield "16384 pairs, 0 negatives", (16384, 0, ("tiles", "open_clip"), 2, full, 1)
        yield "16384 pairs, 4 negatives", (16384, 4, ("tiles",), 1, full, 1)
    if huge:
        yield "65536 pairs, 0 negatives", (65536, 0, ("tiles",), 1, full, 1)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="up to 4,096 pairs; writes nothing")
    parser.add_argument("--huge", action="store_true", help="also 65,536 pairs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {}
    for name, what in sizes(options.small, options.huge):
        rows[name] = measure(*what)
        print(f"{name:50}" + "  ".join(f"{key} {value:g}" for key, value in rows[name].items()), flush=True)
    del rows["warm-up"]
    if options.small:
        return
    on_gpu = DEVICE.type == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else f"{processor()}, {options.threads} threads"
    result = {"date": str(date.today()), "hardware": hardware, "python": platform.python_version()}
    path = RESULTS / ("loss_cuda.json" if on_gpu else "loss.json")
    path.write_text(json.dumps(result | {"torch": torch.__version__, "width": WIDTH, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
