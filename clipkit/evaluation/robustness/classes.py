"""Pictures with a class each, as the questions about pictures need them. Axes: n pictures, c classes, d embedding."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.evaluation import zeroshot
from clipkit.evaluation.benchmark import Benchmark, Picture
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.result import digest, pick, thumbnail
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.scores import Tie

Array = np.ndarray


@dataclass
class Classes:
    """Pictures, their classes' numbers, and every class's prompts and name."""

    pictures: list[Picture]
    labels: Int[Array, " n"]
    prompts: list[list[str]]
    names: list[str]
    coverage: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """All prompts of all classes."""
        return [prompt for prompts in self.prompts for prompt in prompts]

    @property
    def ids(self) -> list[str]:
        """The pictures' names, by which they are clusters too."""
        return [f"{picture.src}:{picture.path}" for picture in self.pictures]

    @property
    def protocol(self) -> dict[str, str]:
        """What was judged, as digests."""
        pictures = digest("\n".join(self.ids))
        return {"classes_and_templates_sha256": digest(repr(self.prompts)), "pictures_sha256": pictures}

    def classifier(self, embedder: Embedder) -> Float[Array, "c d"]:
        """The zero-shot classifier."""
        return zeroshot.weights(embedder, self.prompts)

    def example(
        self,
        embedder: Embedder,
        n: int,
        picture: Picture,
        s: Float[Array, " c"],
        correct: float,
        name: str,
        category: str,
    ) -> dict[str, Any]:
        """A picture with its five nearest classes, its own among them."""
        best = np.argsort(-s, kind="stable")[:5].tolist()
        own = int(self.labels[n])
        if correct == 0 and best[0] == own:  # a tie that counted as wrong
            best = [*best[1:], own]
        shown = best if own in best else [*best[:-1], own]
        return {
            "id": name,
            "category": category,
            "correct": correct,
            "form": "i2t",
            "pictures": [thumbnail(embedder, picture)],
            "texts": [self.names[c] for c in shown],
            "scores": [[float(s[c]) for c in shown]],
            "match": [[int(c == own) for c in shown]],
            "choice": [0],
        }


def read(benchmark: Benchmark, roots: Roots, allow_missing: bool, without: Collection[Picture] = ()) -> Classes:
    """The pictures of the fields of zero-shot benchmarks, a seeded choice of `per_class`. Raises as zeroshot does."""
    found = zeroshot.prepare(benchmark, roots, allow_missing, without)
    chosen = few(found.labels, benchmark.per_class)
    names = [names if isinstance(names, str) else names[0] for names in benchmark.classes.values()]
    pictures = [found.pictures[n] for n in chosen]
    coverage = found.coverage | {"rows": len(pictures)}
    return Classes(pictures, found.labels[chosen], found.prompts, names, coverage)


def few(labels: Int[Array, " n"], per_class: int) -> list[int]:
    """Places of at most so many of every class, seeded; all for 0."""
    if not per_class:
        return list(range(len(labels)))
    rng, chosen = np.random.default_rng(0), []
    for label in np.unique(labels):
        chosen += rng.permutation(np.flatnonzero(labels == label))[:per_class].tolist()
    return sorted(chosen)


def cosines(images: Float[Array, "n d"], classifier: Float[Array, "c d"]) -> Float[Array, "n c"]:
    """fp32, summed in fp64: equal inputs tie exactly."""
    return (images.astype(np.float64) @ classifier.T.astype(np.float64)).astype(np.float32)


def known(s: Float[Array, "n c"], labels: Int[Array, " n"], tie: Tie) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """Whether each picture is taken for its own class, and whether that was a tie."""
    own = s[np.arange(len(s)), labels][:, None]
    better, equal = (s > own).sum(1), (s == own).sum(1) - 1
    tied = (better == 0) & (equal > 0)
    worth = {"strict": 0.0 * equal, "lenient": 1.0 + 0.0 * equal, "half": 1 / (equal + 1)}[tie]
    return np.where(tied, worth, (better == 0).astype(np.float64)), tied


def shown(correct: Sequence[float]) -> list[int]:
    """Places to show as examples."""
    return pick(list(correct))
