"""Memory of the loader: of the process and its workers over an epoch, and of the tokenizer's word cache."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines import BATCH, ours

from clipkit.data import tokenize
from clipkit.data.shards import Index

COPIES = 24
NEW_WORDS = 200_000


def epoch(shard: Path, folder: Path, workers: int = 2) -> dict[str, int | list[int]]:
    """MiB of this process and its workers after each quarter of an epoch: the shard under `COPIES` names."""
    folder.mkdir()
    for number in range(COPIES):
        os.link(shard, folder / f"{number:02d}.tar")
    batches = len(Index.load(folder)) // BATCH
    quarters = [batches * quarter // 4 for quarter in (1, 2, 3, 4)]
    found = []
    for done, _ in enumerate(ours(folder, workers), start=1):
        if done in quarters:
            found.append(sum(map(_mib, [os.getpid(), *_children()])))
    return {"samples": batches * BATCH, "workers": workers, "after each quarter": found}


def caches() -> dict[str, int]:
    """Words the tokenizer keeps after a text of as many different ones."""
    tokenizer, most = tokenize.Tokenizer(), 0
    for first in range(0, NEW_WORDS, 1000):
        tokenizer([" ".join(f"w{number:x}" for number in range(first, first + 1000))])
        most = max(most, len(tokenizer._words), len(tokenizer._inner.cache))
    return {"different words": NEW_WORDS, "most kept": most, "bound": tokenize.CACHED_WORDS}


def _children() -> list[int]:
    return [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _mib(process: int) -> int:
    """Proportional set size: what processes share counts once."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) >> 10
    raise AssertionError("the kernel gives no Pss")
