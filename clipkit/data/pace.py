"""How long an epoch would take to load: the loader itself, on a seeded sample."""

from __future__ import annotations

import time
from typing import Any

from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.settings import DataConfig

PAIRS = 2048
"""About as many pairs are timed."""
BATCH = 64
SETTLED = 4
"""Batches a worker that pass before the clock starts: workers start, and the queues before the trainer fill."""


def pace(index: Index, *, workers: int, negatives: int, size: int = 224, seed: int = 0) -> dict[str, Any]:
    """Seconds that the loader would take for all pairs of the index with so many workers and nothing behind it.

    Measured on the first batches of the order that `seed` gives (small data: over several epochs), read, decoded,
    cropped to `size` pixels and tokenised with `negatives` a caption. Pairs that cannot be read are skipped.
    """
    plan = Plan(index, batch_size=min(BATCH, len(index)), seed=seed)
    data = DataConfig(workers=workers, negatives=negatives, on_error="skip")
    loader = Loader(index, plan, data=data, preprocess=Preprocess(size), tokenizer=Tokenizer(), seed=seed)
    settled = SETTLED * max(1, workers)
    timed = max(settled, PAIRS // plan.batch_size)
    started = 0.0
    for step, _ in enumerate(loader.steps(0, settled + timed), start=1):
        if step == settled:
            started = time.perf_counter()
    pairs = timed * plan.batch_size
    rate = pairs / (time.perf_counter() - started)
    return {
        "seconds": round(len(index) / rate, 3),
        "pairs_per_s": round(rate, 1),
        "workers": workers,
        "size": size,
        "negatives": negatives,
        "sample": pairs,
    }
