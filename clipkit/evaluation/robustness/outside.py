"""Pictures of none of the classes, told apart by how sure the zero-shot classifier is.

Three scores of a picture, all from its cosines with the class texts: `mcm`, the largest of their softmax at
temperature 1 (maximum concept matching, Ming et al., arXiv 2211.13445); `softmax`, the same at the model's own scale;
`cosine`, the largest cosine. AUROC: how likely a picture of a class scores above one of none. FPR95: of the pictures of
none, the share that scores at least as high as the lowest of the highest 95 % of the others: lower is better.
Axes: n pictures of classes, m of none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from clipkit.data.members import PICTURES
from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Benchmark, Picture
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.result import Metric, Result, begin, headline, pick, policy, thumbnail
from clipkit.evaluation.robustness.classes import Classes, cosines, read
from clipkit.evaluation.roots import Roots, split_reference
from clipkit.evaluation.scores import Tie
from clipkit.evaluation.stats import Resampler, auroc, interval, wilson

Array = np.ndarray
KEPT = 0.95
"""Share of the pictures of classes that FPR95's threshold lets through."""
WORTH = {"strict": 0.0, "half": 0.5, "lenient": 1.0}


@dataclass
class Outside:
    """Ready to be scored."""

    benchmark: Benchmark
    classes: Classes
    strange: list[Picture]

    @property
    def pictures(self) -> list[Picture]:
        """Of classes, then of none."""
        return [*self.classes.pictures, *self.strange]

    @property
    def texts(self) -> list[str]:
        """All prompts."""
        return self.classes.texts

    def score(self, embedder: Embedder, tie: str) -> Result:
        """AUROC and FPR95 of the three scores."""
        rule = policy(self.benchmark, tie)
        s = cosines(embedder.pictures(self.pictures), self.classes.classifier(embedder))
        inside = np.arange(len(s)) < len(self.classes.pictures)
        scores = {name: certainty(s, scale) for name, scale in self._scales(embedder).items()} | {"cosine": s.max(1)}
        names = [f"{picture.src}:{picture.path}" for picture in self.pictures]
        resampler = Resampler(names)
        drawn = resampler.rows(np.arange(len(names)))
        metrics: dict[str, Metric] = {}
        for name, sure in scores.items():
            metrics |= _metrics(name, sure, inside, drawn, rule)
        top = headline(self.benchmark, metrics, "mcm/auroc")
        main = scores[top.partition("/")[0]]
        border = threshold(main[inside])
        right = (main >= border) == inside
        return begin(
            self.benchmark,
            n=len(s),
            headline=top,
            metrics=metrics,
            by_category={},
            tie={
                "policy": tie,
                "rule": rule,
                "rate": float(np.isin(main[~inside], main[inside]).mean()),
                "by_score": {},
            },
            coverage=self.classes.coverage,
            details={
                "pictures": {"of classes": int(inside.sum()), "of none": int((~inside).sum())},
                "thresholds": {name: float(threshold(sure[inside])) for name, sure in scores.items()},
            },
            items=[
                {
                    "id": name,
                    "category": "of classes" if inside[n] else "of none",
                    "cluster": name,
                    "correct": float(right[n]),
                    "certainty": {key: float(sure[n]) for key, sure in scores.items()},
                }
                for n, name in enumerate(names)
            ],
            examples=self._examples(embedder, s, right, names),
            protocol=self.classes.protocol,
        )

    def _scales(self, embedder: Embedder) -> dict[str, float]:
        scale = getattr(embedder.model, "scale", 100.0)
        return {"mcm": 1.0, "softmax": float(scale.detach() if hasattr(scale, "detach") else scale)}

    def _examples(
        self, embedder: Embedder, s: Float[Array, "n c"], right: Bool[Array, " n"], names: list[str]
    ) -> list[dict[str, Any]]:
        out = []
        for n in pick(right.astype(float).tolist()):
            best = np.argsort(-s[n], kind="stable")[:5].tolist()
            known = n < len(self.classes.pictures)
            out.append(
                {
                    "id": names[n],
                    "category": "of classes" if known else "of none",
                    "correct": float(right[n]),
                    "form": "i2t",
                    "pictures": [thumbnail(embedder, self.pictures[n])],
                    "texts": [self.classes.names[c] for c in best],
                    "scores": [[float(s[n, c]) for c in best]],
                    "match": [[int(known and c == self.classes.labels[n]) for c in best]],
                    "choice": [0],
                }
            )
        return out


def prepare(benchmark: Benchmark, roots: Roots, allow_missing: bool = False) -> Outside:
    """Pictures below `outside` are of no class, also where they lie among class folders.

    Raises UserError where there are none, and as zero-shot benchmarks do.
    """
    strange = []
    for entry in benchmark.outside:
        src, folder = split_reference(entry)
        paths = [path for path in roots.paths(src, folder) if path.rpartition(".")[2].lower() in PICTURES]
        if not paths:
            raise UserError(f"outside: no picture in {entry}")
        strange += [Picture(src, path) for path in paths]
    return Outside(benchmark, read(benchmark, roots, allow_missing, set(strange)), strange)


def certainty(s: Float[Array, "n c"], scale: float) -> Float[Array, " n"]:
    """The largest probability of softmax(scale · cosines), in fp64."""
    powers = np.exp(scale * (s - s.max(1, keepdims=True)).astype(np.float64))
    return 1 / powers.sum(1)


def threshold(sure: Float[Array, " n"], weights: Float[Array, " n"] | None = None) -> float:
    """The highest score that at least 95 % of (the weight of) these reach."""
    order = np.argsort(-sure, kind="stable")
    passed = np.cumsum(np.ones(len(sure)) if weights is None else weights[order])
    return float(sure[order][np.searchsorted(passed, KEPT * passed[-1] - 1e-9)])


def false_positives(
    inside: Float[Array, " n"],
    strange: Float[Array, " m"],
    weights: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
    *,
    tie: Tie = "strict",
) -> float:
    """Share of `strange` let through at the threshold that lets 95 % of `inside` through; at it, by the tie rule."""
    of_inside, of_strange = weights or (None, np.ones(len(strange)))
    border = threshold(inside, of_inside)
    let_through = (strange > border) + (1 - WORTH[tie]) * (strange == border)
    return float((let_through * of_strange).sum() / of_strange.sum())


def _metrics(
    name: str, sure: Float[Array, " n"], inside: Bool[Array, " n"], drawn: Float[Array, "b n"], tie: Tie
) -> dict[str, Metric]:
    area = float(auroc(sure, inside, tie=WORTH[tie])[0])
    areas = auroc(sure, inside, drawn, tie=WORTH[tie])
    passed = false_positives(sure[inside], sure[~inside], tie=tie)
    rates = [
        false_positives(sure[inside], sure[~inside], (line[inside], line[~inside]), tie=tie)
        for line in drawn
        if line[inside].any() and line[~inside].any()
    ]
    n, strange = len(sure), int((~inside).sum())
    return {
        f"{name}/auroc": Metric(area, *_bounds(area, areas, n), n, 0.5),
        f"{name}/fpr95": Metric(passed, *_bounds(passed, np.array(rates), strange), strange, KEPT),
    }


def _bounds(value: float, draws: Float[Array, " b"], n: int) -> tuple[float, float]:
    draws = draws[~np.isnan(draws)]
    return interval(draws) if len(draws) and np.ptp(draws) else wilson(value * n, n)
