"""What an evaluation hands over: numbers with intervals and chance, every item, and examples to look at."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.benchmark import Benchmark, Picture
from clipkit.evaluation.embed import Embedder

THUMBNAIL = 128
"""Longest side of an example's picture, in pixels."""


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % interval, how many rows it rests on, and what guessing gives."""

    value: float
    low: float
    high: float
    n: int
    chance: float | None = None


@dataclass
class Result:
    """One benchmark on one model; `to_json` is the content of results/<benchmark>.json."""

    benchmark: str
    kind: str
    version: str
    title: str
    n: int
    headline: str
    """The metric that stands for the benchmark."""
    metrics: dict[str, Metric]
    by_category: dict[str, dict[str, Metric]]
    items: list[dict[str, Any]]
    model: str = ""
    breakdowns: dict[str, dict[str, dict[str, Metric]]] = field(default_factory=dict)
    """Field -> value -> score -> metric."""
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What needs no understanding: name -> {title, metrics {name: value}, by_category {category: {score: value}}}."""
    tie: dict[str, Any] = field(default_factory=dict)
    """{policy, rule, rate, by_score}."""
    coverage: dict[str, Any] = field(default_factory=dict)
    """{share, rows, missing {source: pictures}}."""
    protocol: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """{about, licence, homepage, leakage, aggregates, note, reference [...]} of the benchmark."""
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def score(self) -> Metric:
        """The headline metric."""
        return self.metrics[self.headline]

    def to_json(self) -> str:
        """JSON text; numbers rounded to six places."""
        return json.dumps(_rounded(asdict(self)), ensure_ascii=False)

    def save(self, folder: str | Path) -> Path:
        """Write <folder>/<benchmark>.json in one move."""
        path = Path(folder) / f"{self.benchmark}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(self.to_json())
        os.replace(part, path)
        return path

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """A result file. Raises UserError if it is not one."""
        try:
            tree = json.loads(Path(path).read_text())
            tree["metrics"] = _metrics(tree["metrics"])
            tree["by_category"] = {name: _metrics(scores) for name, scores in tree["by_category"].items()}
            tree["breakdowns"] = {
                field: {value: _metrics(scores) for value, scores in values.items()}
                for field, values in tree["breakdowns"].items()
            }
            return cls(**tree)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: not a clipkit result file: {error}") from None


class Task(Protocol):
    """A benchmark whose rows are read and whose pictures were found: ready to be scored."""

    benchmark: Benchmark

    @property
    def pictures(self) -> list[Picture]:
        """Needed, in any order, repeats allowed."""
        ...

    @property
    def texts(self) -> list[str]:
        """Needed, in any order, repeats allowed."""
        ...

    def score(self, embedder: Embedder, tie: str) -> Result:
        """The result; everything needed comes from the embedder."""
        ...


def begin(benchmark: Benchmark, **parts: Any) -> Result:
    """A Result with what the benchmark itself knows filled in."""
    about = benchmark.model_dump(include={"about", "licence", "homepage", "citation", "leakage", "aggregates"}) | {
        "note": benchmark.official.note,
        "reference": [reference.model_dump() for reference in benchmark.reference],
    }
    protocol = {"benchmark_sha256": digest(benchmark.model_dump_json()), "clipkit": _version()}
    return Result(
        benchmark=benchmark.name,
        kind=benchmark.kind,
        version=benchmark.version,
        title=benchmark.title,
        about=about,
        **parts | {"protocol": protocol | parts.get("protocol", {})},
    )


def policy(benchmark: Benchmark, tie: str) -> Any:
    """The tie rule meant by a policy: `official` is the benchmark's own."""
    return benchmark.official.tie if tie == "official" else tie


def headline(benchmark: Benchmark, metrics: dict[str, Metric], default: str) -> str:
    """The benchmark's own headline metric, else the default. Raises UserError if there is no such metric."""
    wanted = benchmark.official.headline or default
    if wanted not in metrics:
        raise UserError(f"{benchmark.name}: official.headline: no metric {wanted}{did_you_mean(wanted, metrics)}")
    return wanted


WORST = 4
"""Examples that are furthest wrong, beside those drawn by chance."""


def pick(correct: Sequence[float], count: int = 16, seed: int = 0, wrong_by: Sequence[float] = ()) -> list[int]:
    """Rows to show as examples: half wrong, half right as far as there are, seeded, in order.

    Where `wrong_by` says how far each row is from right, the WORST of the wrong ones are among them.
    """
    rng = random.Random(seed)
    right = [i for i, c in enumerate(correct) if c == 1]
    wrong = [i for i, c in enumerate(correct) if c != 1]
    worst = furthest_wrong(correct, wrong_by)
    from_wrong = min(len(wrong), max(count // 2, count - len(right)))
    drawn = rng.sample([i for i in wrong if i not in worst], max(0, from_wrong - len(worst)))
    return sorted([*worst, *drawn, *rng.sample(right, min(len(right), count - from_wrong))])


def furthest_wrong(correct: Sequence[float], wrong_by: Sequence[float]) -> list[int]:
    """The WORST of the wrong rows, the furthest first; rows whose distance is not a number are none of them."""
    wrong = [i for i, by in enumerate(wrong_by) if correct[i] != 1 and math.isfinite(by)]
    return sorted(wrong, key=lambda i: (-wrong_by[i], i))[:WORST]


def wrong_by(scores: Sequence[Sequence[float]], match: Sequence[Sequence[int | None]]) -> float:
    """How far a row (images × texts) is from right: the best wrong answer less the best right one, the widest gap.

    Of every picture among texts and every text among pictures; not a number where nothing stands against anything.
    """
    lines = [*zip(scores, match), *zip(zip(*scores), zip(*match))]
    gaps = [
        max(s for s, m in zip(*line) if m == 0) - max(s for s, m in zip(*line) if m == 1)
        for line in lines
        if {0, 1} <= set(line[1])
    ]
    return max(gaps, default=math.nan)


def thumbnail(embedder: Embedder, picture: Picture) -> str:
    """The picture as a small JPEG data URI."""
    image = embedder.open(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def digest(text: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _version() -> str:
    try:
        return version("clipkit")
    except PackageNotFoundError:
        return "unknown"


def _metrics(tree: dict[str, Any]) -> dict[str, Metric]:
    return {name: Metric(**values) for name, values in tree.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
