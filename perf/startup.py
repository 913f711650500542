"""What starting `clipkit --help` costs: CPU and wall seconds, median and worst of many fresh processes.

python perf/startup.py [RUNS]        prints, and writes perf/results/startup.json
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "startup.json"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import clipkit": ["-c", "import clipkit"],
    "clipkit --help": ["-m", "clipkit", "--help"],
    "clipkit shards build --help": ["-m", "clipkit", "shards", "build", "--help"],
}


def once(arguments: list[str]) -> tuple[float, float]:
    """(CPU, wall) seconds of one fresh interpreter."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def processor() -> str:
    """Model name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main(runs: int = 30) -> None:
    """Measure, print, write."""
    rows = {}
    for name, arguments in COMMANDS.items():
        once(arguments)  # fills the bytecode and page caches
        cpu, wall = zip(*(once(arguments) for _ in range(runs)))
        rows[name] = {
            "cpu_s": round(statistics.median(cpu), 3),
            "cpu_worst_s": round(max(cpu), 3),
            "wall_s": round(statistics.median(wall), 3),
            "wall_worst_s": round(max(wall), 3),
        }
        print(f"{name:30}" + "".join(f"{key} {value:.3f}   " for key, value in rows[name].items()))
    hardware = f"{processor()}, {os.cpu_count()} cores"
    result = {"date": str(date.today()), "hardware": hardware, "python": platform.python_version(), "runs": runs}
    RESULT.write_text(json.dumps(result | {"commands": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
