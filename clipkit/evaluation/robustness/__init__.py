"""Robustness: what is left of recognition and retrieval when pictures, wordings or languages change.

A benchmark of `kind: robustness` asks one question, by the field it has: `corruptions`, `attack`, `outside`,
`paraphrases` or `languages`.
"""

from __future__ import annotations

from clipkit.evaluation.benchmark import Benchmark
from clipkit.evaluation.result import Task
from clipkit.evaluation.robustness import attacked, corrupted, outside, wordings
from clipkit.evaluation.roots import Roots


def prepare(benchmark: Benchmark, roots: Roots, allow_missing: bool = False) -> Task:
    """Read what the benchmark's question needs. Raises UserError as the kinds it builds on do."""
    if benchmark.corruptions:
        return corrupted.prepare(benchmark, roots, allow_missing)
    if benchmark.attack:
        return attacked.prepare(benchmark, roots, allow_missing)
    if benchmark.outside:
        return outside.prepare(benchmark, roots, allow_missing)
    if benchmark.languages:
        return wordings.prepare_languages(benchmark, roots, allow_missing)
    return wordings.prepare_paraphrases(benchmark, roots, allow_missing)
