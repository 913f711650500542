"""Plain against fused attention on CPUs, forward and backward, at the lengths that small towers see.

python perf/attention.py [RUNS]      prints, and writes perf/results/attention.json (seconds, one thread, best of RUNS)
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from startup import processor
from torch.nn.attention import SDPBackend, sdpa_kernel

RESULT = Path(__file__).parent / "results" / "attention.json"
SHAPES = {
    "128 texts of 24 tokens, 4 heads of 32": (128, 4, 24, 32, True),
    "640 texts of 24 tokens, 4 heads of 32": (640, 4, 24, 32, True),
    "64 texts of 77 tokens, 8 heads of 64": (64, 8, 77, 64, True),
    "128 maps of 8 x 8, 2 heads of 64": (128, 2, 65, 64, False),
    "64 pictures of 14 x 14 patches, 8 heads of 64": (64, 8, 197, 64, False),
}


def seconds(shape: tuple[int, int, int, int, bool], dtype: torch.dtype, backend: SDPBackend, runs: int) -> float:
    """Best time of one forward and backward."""
    n, heads, tokens, width, causal = shape
    q, k, v = (torch.randn(n, heads, tokens, width, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.full((tokens, tokens), float("-inf"), dtype=dtype).triu(1) if causal else None
    best = float("inf")
    for _ in range(runs):
        began = time.perf_counter()
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
        best = min(best, time.perf_counter() - began)
    return best


def main(runs: int = 20) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    rows = {}
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            fused, plain = (seconds(shape, dtype, b, runs) for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH))
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            rows[key] = {"fused_s": round(fused, 5), "plain_s": round(plain, 5), "fused/plain": round(fused / plain, 2)}
            print(f"{key:62}" + "".join(f"{column} {value}   " for column, value in rows[key].items()))
    hardware = f"{processor()}, {os.cpu_count()} cores"
    result = {"date": str(date.today()), "hardware": hardware, "python": platform.python_version(), "runs": runs}
    RESULT.write_text(json.dumps(result | {"torch": torch.__version__, "forward and backward": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
