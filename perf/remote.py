"""Shards behind http: requests and bytes a sample, and samples a second, where every answer takes a while.

python perf/remote.py [SHARDS] [DELAY_MS]      prints, and writes perf/results/remote.json

A local server that waits DELAY_MS before each answer stands for an object store; shards of 250 pairs with pictures of
48 kB. Reading follows the plan of one rank (64 lanes, batches of 512), then of one of eight ranks alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from startup import processor

sys.path.insert(0, str(Path(__file__).parent.parent))
from clipkit.data.build import Sample, write_shards
from clipkit.data.plan import Plan
from clipkit.data.shards import Index, _opened  # to forget what was read before
from tests.server import Handler, serving

RESULT = Path(__file__).parent / "results" / "remote.json"
PER_SHARD, PICTURE, BATCH = 250, 48_000, 512


def serve(folder: str, delay_s: float, end: Any) -> None:
    """The server, in a process of its own; sends its URL, then what was asked for, when asked."""

    def late(request: Handler, _path: str, _number: int) -> bool:
        time.sleep(delay_s)
        return False

    with serving(Path(folder)) as server:
        server.trouble = late
        end.send(server.url)
        while end.recv():
            with server.lock:
                end.send([asked for _, asked in server.asked])
                server.asked.clear()


def asked(end: Any) -> tuple[int, int]:
    """(requests, bytes) since the last call."""
    end.send(True)
    ranges = [text[6:].split("-") for text in end.recv() if text]
    return len(ranges), sum(int(stop) - int(start) + 1 for start, stop in ranges)


def read(index: Index, ranks: int, ahead: bool) -> dict[str, float]:
    """Read the first of `ranks` shares of an epoch's batches; seconds and samples."""
    plan = Plan(index, batch_size=BATCH)
    began, count = time.perf_counter(), 0
    for i in range(plan.batches):
        ids = plan.ids(0, i)[: BATCH // ranks].tolist()
        if ahead:
            index.prefetch(ids)
        count += sum(len(index.read(id)) > 0 for id in ids)
    return {"samples": count, "seconds": round(time.perf_counter() - began, 2)}


def main(shards: int = 32, delay_ms: int = 25) -> None:
    """Measure, print, write."""
    noise = random.Random(0).randbytes(PICTURE)
    result: dict[str, Any] = {"delay_ms": delay_ms, "pairs": shards * PER_SHARD, "sample_bytes": PICTURE}
    with tempfile.TemporaryDirectory() as folder:
        pairs = (Sample(f"{i:06d}", noise, "jpg", ["words"]) for i in range(shards * PER_SHARD))
        write_shards(pairs, f"{folder}/www", per_shard=PER_SHARD, progress=False)
        here, there = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        server = spawn.Process(target=serve, args=(f"{folder}/www", delay_ms / 1000, there))
        server.start()
        url = f"{here.recv()}/shard-{{000000..{shards - 1:06d}}}.tar"
        for name, ranks, block, ahead in (
            ("one rank", 1, 4 << 20, True),
            ("one rank, without reading ahead", 1, 4 << 20, False),
            ("one of eight ranks", 8, 4 << 20, True),
            ("one of eight ranks, blocks of 256 KiB", 8, 256 << 10, True),
        ):
            os.environ |= {"CLIPKIT_CACHE": f"{folder}/cache-{name}", "CLIPKIT_BLOCK_BYTES": str(block)}
            _opened.cache_clear()
            began = time.perf_counter()
            index = Index.load(url, progress=False)
            seconds = round(time.perf_counter() - began, 2)
            result["index"] = dict(zip(("requests", "bytes"), asked(here))) | {"seconds": seconds}
            found = read(index, ranks, ahead)
            requests, size = asked(here)
            found |= {
                "requests_a_sample": round(requests / found["samples"], 4),
                "bytes_a_byte": round(size / found["samples"] / PICTURE, 2),
                "samples_a_second": round(found["samples"] / found["seconds"]),
            }
            result[name] = found
        here.send(False)
        server.join()
    hardware = f"{processor()}, {os.cpu_count()} cores"
    result = {"date": str(date.today()), "hardware": hardware, "python": platform.python_version(), **result}
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
