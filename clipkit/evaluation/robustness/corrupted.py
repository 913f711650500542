"""How many pictures are still known when they are worse (ImageNet-C's way of asking, arXiv 1903.12261).

All are brought to 224 pixels first, the clean ones too. Every picture is worse in every kind at every severity; means
are over severities, then kinds. Without AlexNet's errors there is no normalised mCE: `corrupted` is the mean accuracy,
`kept` its share of the clean one. Axes: n pictures, v variants of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from clipkit.evaluation.benchmark import Benchmark, Picture
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.result import Metric, Result, begin, headline, policy
from clipkit.evaluation.robustness.classes import Classes, cosines, known, read, shown
from clipkit.evaluation.robustness.corruptions import CORRUPTIONS, FAMILIES, FRAMED, check
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.stats import Resampler, interval, mean_interval, wilson

Array = np.ndarray


@dataclass
class Corrupted:
    """Ready to be scored. `variants`: (kind, severity)."""

    benchmark: Benchmark
    classes: Classes
    variants: list[tuple[str, int]]

    @property
    def pictures(self) -> list[Picture]:
        """The clean ones, then variant by variant."""
        return [p._replace(change=change) for change in self._changes() for p in self.classes.pictures]

    @property
    def texts(self) -> list[str]:
        """All prompts."""
        return self.classes.texts

    def _changes(self) -> list[str]:
        return [FRAMED, *(f"{kind}:{severity}" for kind, severity in self.variants)]

    def score(self, embedder: Embedder, tie: str) -> Result:
        """Clean and corrupted accuracy, by kind, family and severity."""
        rule, classifier, n = policy(self.benchmark, tie), self.classes.classifier(embedder), len(self.classes.pictures)
        changes = self._changes()
        s = np.stack(
            [
                cosines(embedder.pictures([p._replace(change=change) for p in self.classes.pictures]), classifier)
                for change in changes
            ]
        )
        labels = np.tile(self.classes.labels, len(changes))
        credit, tied = (x.reshape(len(changes), n) for x in known(s.reshape(-1, s.shape[2]), labels, rule))
        clean, worse = credit[0], credit[1:].T
        metrics = self._metrics(clean, worse)
        return begin(
            self.benchmark,
            n=n,
            headline=headline(self.benchmark, metrics, "corrupted/top1"),
            metrics=metrics,
            by_category=self._by(worse, [kind for kind, _ in self.variants]),
            breakdowns={
                "family": self._by(worse, [_family(kind) for kind, _ in self.variants]),
                "severity": self._by(worse, [str(severity) for _, severity in self.variants]),
            },
            tie={
                "policy": tie,
                "rule": rule,
                "rate": float(tied[1:].mean()),
                "by_score": {"clean": float(tied[0].mean())},
            },
            coverage=self.classes.coverage,
            items=self._items(credit),
            examples=self._examples(embedder, credit, s),
            protocol=self.classes.protocol,
        )

    def _weights(self) -> Float[Array, " v"]:
        """Of the variants: kinds alike, severities of a kind alike."""
        kinds = [kind for kind, _ in self.variants]
        return np.array([1 / kinds.count(kind) / len(set(kinds)) for kind in kinds])

    def _metrics(self, clean: Float[Array, " n"], worse: Float[Array, "n v"]) -> dict[str, Metric]:
        n, guess, resampler = len(clean), 1 / len(self.classes.names), Resampler(self.classes.ids)
        everyone = np.ones(n, dtype=bool)
        left = worse @ self._weights()
        before, after = resampler.totals(clean, everyone), resampler.totals(left, everyone)
        kept = left.sum() / clean.sum() if clean.any() else 0.0
        share = after[before > 0] / before[before > 0]
        bounds = interval(share) if len(share) and np.ptp(share) else wilson(min(1.0, kept) * n, n)
        return {
            "clean/top1": Metric(*mean_interval(clean, [(1.0, everyone)], resampler), n, guess),
            "corrupted/top1": Metric(*mean_interval(left, [(1.0, everyone)], resampler), n, guess),
            "kept/top1": Metric(float(kept), *bounds, n),
        }

    def _by(self, worse: Float[Array, "n v"], values: list[str]) -> dict[str, dict[str, Metric]]:
        resampler, everyone = Resampler(self.classes.ids), np.ones(len(worse), dtype=bool)
        weights, found = self._weights(), {}
        for value in dict.fromkeys(values):
            of = np.array([other == value for other in values])
            mean = worse[:, of] @ (weights[of] / weights[of].sum())
            bounds = mean_interval(mean, [(1.0, everyone)], resampler)
            found[value] = {"corrupted": Metric(*bounds, len(worse), 1 / len(self.classes.names))}
        return found

    def _items(self, credit: Float[Array, "v n"]) -> list[dict[str, Any]]:
        items = []
        for change, line in zip(self._changes(), credit, strict=True):
            score = "clean" if change == FRAMED else "corrupted"
            for name, right in zip(self.classes.ids, line.tolist(), strict=True):
                about = {"id": f"{name}#{change}", "category": change.partition(":")[0], "cluster": name}
                items.append(about | {"correct": right, "decisions": {score: right}})
        return items

    def _examples(
        self, embedder: Embedder, credit: Float[Array, "v n"], s: Float[Array, "v n c"]
    ) -> list[dict[str, Any]]:
        """Of the pictures known when clean, what became of them."""
        known_before = np.flatnonzero(credit[0] == 1)
        places = [(v, n) for n in known_before for v in range(1, len(credit))]
        chosen = shown([credit[place] for place in places])
        changes, out = self._changes(), []
        for v, n in (places[k] for k in chosen):
            name, change = f"{self.classes.ids[n]}#{changes[v]}", changes[v]
            picture = self.classes.pictures[n]._replace(change=change)
            kind = change.partition(":")[0]
            out.append(self.classes.example(embedder, n, picture, s[v, n], float(credit[v, n]), name, kind))
        return out


def prepare(benchmark: Benchmark, roots: Roots, allow_missing: bool = False) -> Corrupted:
    """Raises UserError for a kind of corruption that there is not, and as zero-shot benchmarks do."""
    assert benchmark.corruptions is not None
    kinds, severities = benchmark.corruptions.kinds or list(CORRUPTIONS), benchmark.corruptions.severities
    variants = [(kind, severity) for kind in dict.fromkeys(kinds) for severity in sorted(set(severities))]
    for variant in variants:
        check(*variant)
    return Corrupted(benchmark, read(benchmark, roots, allow_missing), variants)


def _family(kind: str) -> str:
    return next(family for family, kinds in FAMILIES.items() if kind in kinds)
