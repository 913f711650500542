"""How numbers and names are written for people."""

from __future__ import annotations

from collections.abc import Sequence

from clipkit.evaluation.report.paired import Change
from clipkit.evaluation.result import Metric

KINDS = {
    "compositional": "compositional",
    "zeroshot": "zero-shot classification",
    "retrieval": "retrieval",
    "robustness": "robustness",
}
NAMES = {
    "i2t": "picture → text",
    "t2i": "text → picture",
    "group": "both ways",
    "i2t_all": "picture → all its texts",
    "binary": "true or false",
    "auroc": "AUROC",
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "micro": "all rows",
    "macro": "mean of categories",
    "r1": "R@1",
    "r5": "R@5",
    "r10": "R@10",
    "median_rank": "median rank (lower is better)",
    "p_right": "right ones said to fit",
    "p_wrong": "wrong ones said not to fit",
    "judged": "at a threshold",
    "worse": "the worse of both answers",
    "same": "both wordings decide alike",
    "ap": "average precision",
    "mcm": "maximum concept matching",
    "fpr95": "false positive rate at 95 % (lower is better)",
    "variance_of_rank": "variance of the rank (lower is better)",
    "deviation_of_rank": "deviation of the rank (lower is better)",
}
NONE = "–"


def label(key: str) -> str:
    """`i2t/macro` → picture → text, mean of categories."""
    return ", ".join(plain(part) for part in key.split("/"))


def plain(name: str) -> str:
    """A name of the code, or of a category, in words."""
    return NAMES.get(name, name.removeprefix("meta.").replace("_", " "))


def number(value: float | None, key: str) -> str:
    """A share in percent; a rank as it is."""
    if value is None:
        return NONE
    return f"{value:.1f}" if is_rank(key) else f"{100 * value:.1f}"


def span(metric: Metric, key: str) -> str:
    """The interval: 81.0–85.1."""
    return f"{number(metric.low, key)}–{number(metric.high, key)}"


def signed(value: float, key: str) -> str:
    """A difference in points, with a true minus sign."""
    text = f"{value if is_rank(key) else 100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def is_rank(key: str) -> bool:
    """Whether a metric is a place in a list: lower is better, no share."""
    return key.endswith("rank")


def p_value(p: float) -> str:
    """p = 0.02; p < 0.01 (below, a bootstrap's p only says that no resample went the other way)."""
    return "p < 0.01" if p < 0.01 else f"p = {p:.2f}"


def verdict(change: Change, adjusted: float | None) -> tuple[str, str]:
    """(sign, word) for a change with its Holm-adjusted p; none where nothing was tested."""
    if adjusted is None:
        return "", ""
    if adjusted >= 0.05:
        return "≈", "no clear difference"
    return ("▲", "better") if change.value > 0 else ("▼", "worse")


def listed(names: Sequence[str]) -> str:
    """A, B and C."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def short(value: float) -> str:
    """An axis label: 12k, 1.5M, 0.003, 2e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
