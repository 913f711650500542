"""Whether captions that say the same find the same: paraphrases, and languages.

Two paraphrases of a picture's caption each rank all pictures. `agreement`: both put the same picture first; `overlap`:
the mean over depths 1 to 10 of the share of pictures their lists have in common, `jaccard`: of their first ten, common
ones among all (average overlap and Jaccard similarity, as ParaCLIP reports them, arXiv 2402.15120); `both`: both find
the picture they are of.

A caption in each of several languages: R@1 of each, and how far the rank of the right answer varies between languages
(mean rank variance, arXiv 2406.18254; `deviation_of_rank` is the mean standard deviation, which its script prints).

Ties: a picture's place is 1 + those before it + those equal to it (strict), none (lenient) or half of them.
Axes: n pictures, q queries, k depth, l languages.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Benchmark, Picture
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.result import Metric, Result, begin, digest, headline, pick, policy, thumbnail
from clipkit.evaluation.retrieval import BLOCK, Captioned, read
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.scores import Tie
from clipkit.evaluation.stats import Resampler, mean_interval

Array = np.ndarray
DEPTH = 10
EQUAL = {"strict": 1.0, "half": 0.5, "lenient": 0.0}


@dataclass
class Paraphrases:
    """Ready to be scored: of every picture two captions."""

    benchmark: Benchmark
    pictures: list[Picture]
    first: list[str]
    second: list[str]
    same: Int[Array, " n"]
    """Pictures of one number are the same picture."""
    coverage: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """Both captions of all."""
        return [*self.first, *self.second]

    def score(self, embedder: Embedder, tie: str) -> Result:
        """Agreement of the two rankings."""
        rule = policy(self.benchmark, tie)
        images = embedder.pictures(self.pictures).astype(np.float64)
        words = [embedder.texts(texts).astype(np.float64) for texts in (self.first, self.second)]
        names = [f"{picture.src}:{picture.path}" for picture in self.pictures]
        rows, ties = [], []
        for at in range(0, len(images), BLOCK):
            s = [(some[at : at + BLOCK] @ images.T).astype(np.float32) for some in words]
            places = [ranks(one, rule) for one in s]
            ties += [(one == one.max(1, keepdims=True)).sum(1) > 1 for one in s]
            rows += [alike(places[0][q], places[1][q], self.same == self.same[at + q]) for q in range(len(places[0]))]
        credits = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        metrics = self._metrics(credits, names)
        correct = credits["agreement"]
        return begin(
            self.benchmark,
            n=len(names),
            headline=headline(self.benchmark, metrics, "agreement/top1"),
            metrics=metrics,
            by_category={},
            tie={"policy": tie, "rule": rule, "rate": float(np.concatenate(ties).mean()), "by_score": {}},
            coverage=self.coverage,
            items=[
                {
                    "id": name,
                    "category": "pair",
                    "cluster": name,
                    "correct": float(correct[n]),
                    "decisions": {key: float(credit[n]) for key, credit in credits.items()},
                }
                for n, name in enumerate(names)
            ],
            examples=self._examples(embedder, images, words, correct, names),
            protocol={"captions_sha256": digest(repr([*zip(names, self.first, self.second)]))},
        )

    def _metrics(self, credits: dict[str, Float[Array, " n"]], names: list[str]) -> dict[str, Metric]:
        n, resampler, everyone = len(names), Resampler(names), np.ones(len(names), dtype=bool)
        depth = min(DEPTH, n)
        guess = {
            "agreement/top1": 1 / n,
            "overlap/at10": (depth + 1) / (2 * n),
            "jaccard/at10": _chance_of_jaccard(n, depth),
            "both/r1": float(np.mean([((self.same == s).sum() / n) ** 2 for s in self.same])),
        }
        return {
            key: Metric(*mean_interval(credits[key.partition("/")[0]], [(1.0, everyone)], resampler), n, guess[key])
            for key in guess
        }

    def _examples(
        self,
        embedder: Embedder,
        images: Float[Array, "n d"],
        words: list[Float[Array, "n d"]],
        correct: Float[Array, " n"],
        names: list[str],
    ) -> list[dict[str, Any]]:
        out = []
        for n in pick(correct.tolist()):
            s = np.stack([images @ some[n] for some in words], axis=1)  # picture × the two captions
            firsts = [int(s[:, which].argmax()) for which in (0, 1)]
            shown = list(dict.fromkeys([*firsts, n]))
            out.append(
                {
                    "id": names[n],
                    "category": "pair",
                    "correct": float(correct[n]),
                    "form": "t2i",
                    "pictures": [thumbnail(embedder, self.pictures[p]) for p in shown],
                    "texts": [self.first[n], self.second[n]],
                    "scores": s[shown].tolist(),
                    "match": [[int(self.same[p] == self.same[n])] * 2 for p in shown],
                    "choice": [shown.index(first) for first in firsts],
                }
            )
        return out


def prepare_paraphrases(benchmark: Benchmark, roots: Roots, allow_missing: bool = False) -> Paraphrases:
    """Pictures with two captions of the kinds asked for, or any two different ones; others are left out and counted.

    Raises UserError where fewer than two pictures are left.
    """
    found, kinds = read(benchmark, roots), benchmark.paraphrases or []
    pairs = [(one, pair) for one in found if (pair := _pair(one, kinds))]
    if len(pairs) < 2:
        wanted = f"of the kinds {kinds[0]} and {kinds[1]}" if kinds else "that differ"
        raise UserError(f"{len(pairs)} of {len(found)} pictures have two captions {wanted}; two pictures at least")
    groups = np.unique(np.array([one.group for one, _ in pairs]), return_inverse=True)[1]
    return Paraphrases(
        benchmark,
        [one.picture for one, _ in pairs],
        [first for _, (first, _) in pairs],
        [second for _, (_, second) in pairs],
        groups,
        _coverage(len(pairs), len(found)),
    )


def ranks(s: Float[Array, "q n"], tie: Tie) -> Float[Array, "q n"]:
    """The place of every picture for every query, from 1; ties by the rule."""
    ordered = np.sort(s, axis=1)
    above = np.stack([len(line) - np.searchsorted(line, own, side="right") for line, own in zip(ordered, s)])
    at_least = np.stack([len(line) - np.searchsorted(line, own, side="left") for line, own in zip(ordered, s)])
    return 1 + above + (at_least - above - 1) * EQUAL[tie]


def alike(first: Float[Array, " n"], second: Float[Array, " n"], own: Array, depth: int = DEPTH) -> dict[str, float]:
    """How far two rankings of the same pictures agree; `own`: the pictures both queries are of."""
    overlaps, jaccard = [], 0.0
    for k in range(1, min(depth, len(first)) + 1):
        a, b = first <= k, second <= k
        common, longer = int((a & b).sum()), max(int(a.sum()), int(b.sum()))
        overlaps.append(common / longer if longer else 0.0)
        jaccard = common / int((a | b).sum()) if longer else 0.0
    both = float((first[own] <= 1).any() and (second[own] <= 1).any())
    return {"agreement": float(overlaps[0] > 0), "overlap": float(np.mean(overlaps)), "jaccard": jaccard, "both": both}


def _chance_of_jaccard(n: int, k: int) -> float:
    """Of two independent choices of k among n."""
    ways = comb(n, k)
    return sum(comb(k, x) * comb(n - k, k - x) / ways * x / (2 * k - x) for x in range(1, k + 1))


def _pair(one: Captioned, kinds: list[str]) -> tuple[str, str] | None:
    if not kinds:
        different = list(dict.fromkeys(one.captions))
        return (different[0], different[1]) if len(different) > 1 else None
    found = [next((c for c, of in zip(one.captions, one.kinds) if of == kind), None) for kind in kinds]
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def _coverage(kept: int, found: int) -> dict[str, Any]:
    return {"share": kept / found, "rows": found, "missing": {}}


@dataclass
class Languages:
    """Ready to be scored: of every picture a caption in each language."""

    benchmark: Benchmark
    pictures: list[Picture]
    captions: dict[str, list[str]]
    same: Int[Array, " n"]
    coverage: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """All captions in all languages."""
        return [text for texts in self.captions.values() for text in texts]

    def score(self, embedder: Embedder, tie: str) -> Result:
        """R@1 of each language and their mean, and the variance of the ranks."""
        rule, images = policy(self.benchmark, tie), embedder.pictures(self.pictures)
        names = [f"{picture.src}:{picture.path}" for picture in self.pictures]
        found: dict[str, Float[Array, "l n"]] = {}
        for direction in ("t2i", "i2t"):
            found[direction] = np.stack(
                [self._ranks(images, embedder, texts, direction, rule) for texts in self.captions.values()]
            )
        metrics: dict[str, Metric] = {}
        for direction, places in found.items():
            metrics |= self._metrics(direction, places, names)
        top = headline(self.benchmark, metrics, "t2i/r1")
        return begin(
            self.benchmark,
            n=len(names),
            headline=top,
            metrics=metrics,
            by_category=self._by_language(found, names),
            tie={"policy": tie, "rule": rule, "rate": self._ties(images, embedder), "by_score": {}},
            coverage=self.coverage,
            items=[
                {
                    "id": f"{direction}/{language}/{name}",
                    "category": language,
                    "cluster": name,
                    "correct": float(place <= 1),
                    "rank": float(place),
                    "decisions": {direction: float(place <= 1)},
                }
                for direction, places in found.items()
                for language, line in zip(self.captions, places, strict=True)
                for name, place in zip(names, line.tolist(), strict=True)
            ],
            protocol={"captions_sha256": digest(repr((names, self.captions)))},
        )

    def _ranks(
        self, images: Float[Array, "n d"], embedder: Embedder, captions: list[str], direction: str, tie: Tie
    ) -> Float[Array, " n"]:
        """The place of each query's best right answer among the wrong ones. Equal captions are one text."""
        texts = embedder.texts(captions)
        queries, answers = (texts, images) if direction == "t2i" else (images, texts)
        words, out = np.unique(np.array(captions), return_inverse=True)[1], []
        for at in range(0, len(queries), BLOCK):
            s = (queries[at : at + BLOCK].astype(np.float64) @ answers.T.astype(np.float64)).astype(np.float32)
            right = (self.same[at : at + BLOCK, None] == self.same) | (words[at : at + BLOCK, None] == words)
            best = np.where(right, s, -np.inf).max(1, keepdims=True)
            wrong = np.where(right, -np.inf, s)
            out.append(1 + (wrong > best).sum(1) + EQUAL[tie] * (wrong == best).sum(1))
        return np.concatenate(out)

    def _ties(self, images: Float[Array, "n d"], embedder: Embedder) -> float:
        worst, best = (
            np.stack([self._ranks(images, embedder, texts, "t2i", rule) for texts in self.captions.values()])
            for rule in ("strict", "lenient")
        )
        return float((worst > best).mean())

    def _metrics(self, direction: str, places: Float[Array, "l n"], names: list[str]) -> dict[str, Metric]:
        n, resampler, everyone = len(names), Resampler(names), [(1.0, np.ones(len(names), dtype=bool))]
        right, spread = (places <= 1).mean(0), places.var(0)
        guess = (1 - 1 / len(places)) * (n**2 - 1) / 12
        return {
            f"{direction}/r1": Metric(*mean_interval(right, everyone, resampler), n, 1 / n),
            f"{direction}_spread/variance_of_rank": Metric(*_positive(spread, everyone, resampler), n, guess),
            f"{direction}_spread/deviation_of_rank": Metric(*_positive(spread**0.5, everyone, resampler), n),
        }

    def _by_language(self, found: dict[str, Float[Array, "l n"]], names: list[str]) -> dict[str, dict[str, Metric]]:
        n, resampler, everyone = len(names), Resampler(names), [(1.0, np.ones(len(names), dtype=bool))]
        return {
            language: {
                direction: Metric(*mean_interval((places[number] <= 1) * 1.0, everyone, resampler), n, 1 / n)
                for direction, places in found.items()
            }
            for number, language in enumerate(self.captions)
        }


def prepare_languages(benchmark: Benchmark, roots: Roots, allow_missing: bool = False) -> Languages:
    """The first caption of every kind in `languages`; pictures that lack one are left out and counted.

    Raises UserError where fewer than two pictures have all, and (unless `allow_missing`) where some lack one.
    """
    found = read(benchmark, roots)
    kept: list[tuple[Captioned, list[str]]] = []
    lacking = dict.fromkeys(benchmark.languages, 0)
    for one in found:
        first = dict(reversed([*zip(one.kinds, one.captions)]))
        for language in benchmark.languages:
            lacking[language] += language not in first
        if all(language in first for language in benchmark.languages):
            kept.append((one, [first[language] for language in benchmark.languages]))
    if len(kept) < 2 or (len(kept) < len(found) and not allow_missing):
        counts = ", ".join(f"{count} none in {language}" for language, count in lacking.items() if count)
        raise UserError(
            f"{len(kept)} of {len(found)} pictures have a caption in all languages (caption_kinds): {counts}"
            + ("" if len(kept) < 2 else "; --allow-missing takes those")
        )
    captions = {language: [texts[k] for _, texts in kept] for k, language in enumerate(benchmark.languages)}
    same = np.unique(np.array([one.group for one, _ in kept]), return_inverse=True)[1]
    return Languages(benchmark, [one.picture for one, _ in kept], captions, same, _coverage(len(kept), len(found)))


def _positive(values: Float[Array, " n"], everyone: Any, resampler: Resampler) -> tuple[float, float, float]:
    """The mean with its interval, of a number that is no share: without spread there is none to tell."""
    if np.ptp(values) == 0:
        value = float(values[0])
        return value, value, value
    return mean_interval(values, everyone, resampler)
