"""Starting in the middle of ten million indexed pairs: seconds and memory of a fresh process.

python perf/seek.py [SHARDS]      prints, and writes perf/results/seek.json

One shard of 1,000 tiny pairs under as many names as wanted, each with its own entry in the index cache, as
`clipkit shards index` leaves them. The process loads the index, seeks to the middle of the third epoch and reads there.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from startup import processor

from clipkit.data import storage
from clipkit.data.build import Sample, write_shard
from clipkit.data.shards import Index
from clipkit.data.tables import FORMAT, _cache_file  # to write entries: 10,000 scans would take minutes

RESULT = Path(__file__).parent / "results" / "seek.json"
PAIRS = 1000
SEEK = """
import json, resource, sys, time
from clipkit.data.plan import Plan
from clipkit.data.shards import Index
began = time.perf_counter()
index = Index.load(sys.argv[1] + "/*.tar")
loaded = time.perf_counter()
plan = Plan(index, batch_size=4096)
ids = plan.ids(2, plan.batches // 2)
found = time.perf_counter()
read = [index.read(int(id)) for id in ids[:256]]
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
times = {"index_s": loaded - began, "seek_s": found - loaded, "read_256_s": time.perf_counter() - found}
print(json.dumps({"pairs": len(index), **{k: round(v, 3) for k, v in times.items()}, "peak_mib": memory}))
"""


def build(folder: Path, shards: int) -> None:
    """`shards` names of one shard, and their cache entries under $CLIPKIT_CACHE."""
    first = folder / "shard-000000.tar"
    write_shard((Sample(f"{i:06d}", b"x", "jpg", ["words"]) for i in range(PAIRS)), first)
    Index.load(first)
    cache = Path(os.environ["CLIPKIT_CACHE"]) / "index"
    (entry,) = cache.glob("*.json")
    head, table = entry.read_text().splitlines()
    for number in range(1, shards):
        path = folder / f"shard-{number:06d}.tar"
        os.link(first, path)
        line = json.dumps(json.loads(head) | {"stamp": {"format": FORMAT, **storage.stamp(path)}})
        _cache_file(path).write_text(f"{line}\n{table}\n")


def main(shards: int = 10_000) -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLIPKIT_CACHE"] = f"{folder}/cache"
        (Path(folder) / "shards").mkdir()
        build(Path(folder) / "shards", shards)
        out = subprocess.run(
            [sys.executable, "-c", SEEK, f"{folder}/shards"], check=True, capture_output=True, text=True
        )
    found = json.loads(out.stdout)
    print(found)
    hardware = f"{processor()}, {os.cpu_count()} cores"
    result = {"date": str(date.today()), "hardware": hardware, "python": platform.python_version(), **found}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
