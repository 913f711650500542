"""Rule negatives a minute: kinds that need a tagged caption, and those that do not.

python perf/negatives.py SHARDS      prints, and writes perf/results/negatives.json

Each kind by itself on 2,000 captions, then all, and DeGLA's five, in CPU time of one process: `negatives make` gives
each worker shards of its own. Kinds share one parse of a caption: `whole` is a kind with it, `tagged` without.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from itertools import islice
from pathlib import Path

from startup import processor

from clipkit.negatives.filters import content
from clipkit.negatives.make import KINDS, Recipe, captions_of, negatives
from clipkit.negatives.tagging import parse
from clipkit.registry import RULES

RESULT = Path(__file__).parent / "results" / "negatives.json"
CAPTIONS = 2000
CORES = 2
"""A minute is one on so many cores, as the bounds are."""


def per_minute(kinds: Sequence[str], captions: list[str], tagged: bool) -> float:
    """Captions a minute on CORES cores, filters included; with `tagged` each has been parsed before."""
    recipe, spent = Recipe(tuple(kinds), 1, 0), 0.0
    for caption in captions:
        parse.cache_clear()
        content.cache_clear()
        if tagged:
            parse(caption)
        began = time.process_time()
        negatives(caption, recipe)
        spent += time.process_time() - began
    return CORES * 60 * len(captions) / spent


def main(*shards: str) -> None:
    """Measure, print, write."""
    captions = list(islice(captions_of(list(shards)), CAPTIONS))
    names = list(RULES)
    per_minute(names, captions[:100], False)  # word lists are read once
    found = {
        name: {t: round(per_minute([name], captions, t == "tagged")) for t in ("whole", "tagged")} for name in names
    }
    found["DeGLA's five"] = {"whole": round(per_minute(KINDS, captions, False))}
    found["all"] = {"whole": round(per_minute(names, captions, False))}
    for name, rates in found.items():
        print(name, rates)
    result = {
        "date": str(date.today()),
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "captions": len(captions),
        "captions_a_minute_on_2_cores": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
