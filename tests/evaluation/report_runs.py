"""Run folders with made-up results of every kind, written as evaluation and training write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from clipkit.evaluation.result import Metric, Result
from clipkit.evaluation.stats import wilson

HOSTILE = '"><script>console.error("hacked")</script><b a=\'&'
PICTURE = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
FORMS: dict[str, list[list[int | None]]] = {
    "swap_object": [[1, 0]],
    "swap_attribute": [[0, 1, None]],
    "winoground": [[1, 0], [0, 1]],
    "pictures": [[0], [1]],
    "truth": [[0]],
}
MAIN = {"swap_object": "i2t", "swap_attribute": "i2t", "winoground": "group", "pictures": "t2i", "truth": "binary"}
ROWS = 30
"""Of each form."""


def metric(credits: list[float], chance: float | None = 0.5) -> Metric:
    value = sum(credits) / len(credits)
    return Metric(value, *wilson(sum(credits), len(credits)), len(credits), chance)


def right(form: str, n: int, skill: int) -> float:
    """Row n is right for the skilled."""
    return float((7 * n + len(form)) % 10 < skill)


def scores(match: list[list[int | None]], correct: float) -> list[list[float]]:
    """Similarities that put every right pair above the wrong ones, or below them."""
    sign = 1 if correct else -1
    return [[0.3 if m is None else 0.3 + sign * (0.1 if m else -0.1) for m in line] for line in match]


def compositional(skill: int, rows: int = ROWS) -> Result:
    """Five forms in one benchmark, with an aggregate, a breakdown, blind baselines and hostile text."""
    items, examples, by_category = [], [], {}
    for form, match in FORMS.items():
        credits = [right(form, n, skill) for n in range(rows)]
        by_category[form] = {"accuracy": metric(credits), MAIN[form]: metric(credits)}
        for n, credit in enumerate(credits):
            item: dict[str, Any] = {"id": f"{form}/{n}", "category": form, "cluster": f"{form} {n}", "correct": credit}
            items.append(
                item | {"decisions": {"accuracy": credit, MAIN[form]: credit}, "scores": scores(match, credit)}
            )
        # Runs of different skill show different examples.
        for n in (skill, skill + 1, 20):
            texts = [f"{form} text {t} {HOSTILE}" for t in range(len(match[0]))]
            shown = {
                "pictures": [PICTURE] * len(match),
                "texts": texts,
                "match": match,
                "form": MAIN[form],
                "choice": [0],
            }
            examples.append(items[n - rows] | shown)
    everything = [item["correct"] for item in items]
    swaps = [item["correct"] for item in items if item["category"].startswith("swap")]
    values = {
        "accuracy/micro": metric(everything),
        "accuracy/macro": metric(everything),
        "accuracy/swap": metric(swaps),
    }
    even, odd = metric(everything[::2]), metric(everything[1::2])
    return Result(
        benchmark="pairs",
        kind="compositional",
        version="1",
        title=f"Pairs & choices {HOSTILE}",
        n=len(items),
        headline="accuracy/macro",
        metrics=values,
        by_category=by_category,
        breakdowns={"meta.seed": {"0": {"accuracy": even}, "1": {"accuracy": odd}}},
        items=items,
        model=f"runs/{skill}",
        baselines={
            "shorter_text": {
                "title": "the text with fewer characters is right",
                "metrics": {"accuracy/macro": 0.625, "accuracy/swap": 0.512},
                "by_category": {"swap_object": {"accuracy": 0.487}},
            }
        },
        tie={"policy": "official", "rule": "strict", "rate": 0.01, "by_score": {"accuracy": 0.01}},
        coverage={"share": rows / ROWS, "rows": ROWS * len(FORMS), "missing": {}},
        protocol={"benchmark_sha256": "0123456789abcdef" * 4, "clipkit": "0.1.0"},
        about={
            "about": "Made up.",
            "licence": "none",
            "leakage": "",
            "note": "",
            "aggregates": {"swap": ["swap_object", "swap_attribute"]},
            "reference": [
                {"model": "Famous B/32", "metric": "accuracy/macro", "value": 0.733, "source": "its paper"},
                {"model": "Famous B/32", "metric": "accuracy/swap_object", "value": 0.611, "source": "its paper"},
            ],
        },
        examples=examples,
    )


def zeroshot(skill: int) -> Result:
    """Three classes; every tenth picture is taken for another class."""
    names, items = ["cat", "dog", "tree frog"], []
    for n in range(60):
        own = names[n % 3]
        credit = float(n % 10 < skill)
        choice = own if credit else names[(n + 1) % 3]
        item = {"id": f"pics:{own}/{n}.jpg", "category": own, "cluster": str(n), "correct": credit, "choice": choice}
        items.append(item | {"rank": 1 if credit else 2})
    examples = [
        {key: items[n][key] for key in ("id", "category", "correct")}
        | {"form": "i2t", "pictures": [PICTURE], "texts": names, "choice": [0]}
        | {"scores": [[0.3, 0.2, 0.1]], "match": [[int(name == items[n]["category"]) for name in names]]}
        for n in (0, 1, skill)
    ]
    credits = [item["correct"] for item in items]
    return Result(
        benchmark="animals",
        kind="zeroshot",
        version="1",
        title="Animals",
        n=60,
        headline="top1",
        metrics={"top1": metric(credits, 1 / 3), "mean_per_class": metric(credits, 1 / 3)},
        by_category={name: {"top1": metric(credits[k::3], 1 / 3)} for k, name in enumerate(names)},
        items=items,
        tie={"policy": "official", "rule": "strict", "rate": 0.0, "by_score": {}},
        coverage={"share": 1.0, "rows": 60, "missing": {}},
        details={
            "calibration": {
                "ece": 0.1,
                "bins": [
                    {"from": 0.4, "sure": 0.45, "right": 0.3, "n": 20},
                    {"from": 0.8, "sure": 0.85, "right": skill / 10, "n": 40},
                ],
            },
            "classes": names,
            "confusions": [{"class": "cat", "taken_for": "dog", "count": 3, "share": 0.15}],
        },
        examples=examples,
    )


def retrieval(skill: int) -> Result:
    """Ten captions a direction."""
    items = [
        {
            "id": f"{way}/{n}",
            "category": way,
            "cluster": str(n),
            "correct": float(n < skill),
            "rank": 1.0 + (n >= skill),
        }
        for way in ("t2i", "i2t")
        for n in range(10)
    ]
    firsts, rank = metric([item["correct"] for item in items[:10]], 0.1), Metric(1.5, 1.0, 2.0, 10, 5.5)
    shown = {
        "scores": [[0.3], [0.2]],
        "match": [[1], [0]],
        "choice": [0],
        "rank": 1.0,
        "form": "t2i",
        "category": "t2i",
    }
    pictures = {"id": "t2i/0", "correct": 1.0, "pictures": [PICTURE, PICTURE], "texts": ["a caption"]}
    return Result(
        benchmark="photos",
        kind="retrieval",
        version="1",
        title="Photos",
        n=10,
        headline="t2i/r1",
        metrics={"t2i/r1": firsts, "t2i/r5": metric([1.0] * 10, 0.5), "i2t/r1": firsts, "i2t/median_rank": rank},
        by_category={},
        items=items,
        tie={"policy": "official", "rule": "strict", "rate": 0.0, "by_score": {"t2i": 0.0}},
        coverage={"share": 1.0, "rows": 10, "missing": {}},
        examples=[shown | pictures],
    )


def write_run(folder: Path, skill: int, rows: int = ROWS) -> Path:
    """A trained and evaluated run; the more skill (0 to 10), the better."""
    for result in (compositional(skill, rows), zeroshot(9), retrieval(5)):
        result.save(folder / "results")
    lines = []
    for step in range(10, 1001, 10):
        terms = {"term/infonce": 4 / step, "term/igc": 2 / step} if skill > 5 else {"term/infonce": 4 / step}
        row = {"step": step, "samples": 64 * step, "loss": sum(terms.values()), **terms, "lr": 5e-4, "grad_norm": 1.5}
        lines.append(row | {"scale": 14.0 + step, "data_wait": 0.02, "samples_per_s": 900.0, "skipped/truncated": 3})
    lines[3]["grad_norm"] = float("nan")
    lines.append({"step": 1000, "samples": 64000, "evaluation": {"pairs": 0.5, "broken": None}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"name": folder.name, "data": {"negatives": skill}, "optim": {"lr": 5e-4}, "note": HOSTILE}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder
