"""Retrieval: each caption looks for its picture (t2i), each picture for one of its captions (i2t).

Axes: p pictures, q captions as written, u different captions, k of R@k. Equal captions are one text, right for every
picture that carries it: the same words cannot be both a hit and a miss.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import comb
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.data.members import PICTURES, SHEETS, Unreadable, read_sheet
from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Benchmark, Picture
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.geometry import alignment, modality_gap, uniformity
from clipkit.evaluation.result import Metric, Result, begin, digest, headline, pick, policy, thumbnail
from clipkit.evaluation.roots import Roots, split_reference
from clipkit.evaluation.scores import Tie
from clipkit.evaluation.stats import Resampler, interval, mean_interval, median

Array = np.ndarray
KS = (1, 5, 10)
BLOCK = 512
"""Queries whose similarities to the whole gallery are held at once."""


@dataclass
class Ranks:
    """One direction: where each query's best right answer stands, from 1, and what was found first."""

    better: Int[Array, " q"]
    equal: Int[Array, " q"]
    right: Int[Array, " q"]
    """How many answers of the gallery are right."""
    first: Int[Array, "q s"]
    """The answers ranked highest."""
    similarity: Float[Array, "q s"]
    own: Int[Array, " q"]
    """The best right answer."""
    own_similarity: Float[Array, " q"]

    def credit(self, k: int, tie: Tie) -> Float[Array, " q"]:
        """Whether a right answer is among the first k; a tie with wrong ones by the rule."""
        if tie == "half":
            return np.clip((k - self.better) / (self.equal + 1), 0.0, 1.0)
        return (self.better + (self.equal if tie == "strict" else 0) < k).astype(np.float64)

    def rank(self, tie: Tie) -> Float[Array, " q"]:
        """Rank of the best right answer; ties count against it, for it, or half."""
        return 1 + self.better + self.equal * {"strict": 1.0, "half": 0.5, "lenient": 0.0}[tie]


@dataclass
class Retrieval:
    """A retrieval benchmark ready to be scored. Query q of t2i is caption `written[q]` of picture `owner[q]`."""

    benchmark: Benchmark
    pictures: list[Picture]
    texts: list[str]
    written: Int[Array, " q"]
    owner: Int[Array, " q"]
    match: Bool[Array, "p u"]
    coverage: dict[str, Any]

    def score(self, embedder: Embedder, tie: str) -> Result:
        """R@1/5/10 and median rank in both directions, items and examples."""
        images, texts = embedder.pictures(self.pictures), embedder.texts(self.texts)
        rule = policy(self.benchmark, tie)
        i2t = rank(images, texts, self.match)
        t2i = _taken(rank(texts, images, self.match.T), self.written)
        names = [f"{p.src}:{p.path}" for p in self.pictures]
        clusters = {"t2i": [names[o] for o in self.owner], "i2t": names}
        metrics: dict[str, Metric] = {}
        for direction, ranks, gallery in (("t2i", t2i, len(images)), ("i2t", i2t, len(texts))):
            metrics |= _metrics(direction, ranks, gallery, clusters[direction], rule)
        rates = {d: float((r.equal > 0).mean()) for d, r in (("t2i", t2i), ("i2t", i2t))}
        top = headline(self.benchmark, metrics, "t2i/r1")
        return begin(
            self.benchmark,
            n=len(self.written),
            headline=top,
            metrics=metrics,
            by_category={},
            tie={"policy": tie, "rule": rule, "rate": rates[top.partition("/")[0]], "by_score": rates},
            coverage=self.coverage,
            details={
                "pictures": len(images),
                "captions": len(self.written),
                "different_captions": len(texts),
                "alignment": alignment(images[self.owner], texts[self.written]),
                "uniformity": {"pictures": uniformity(images), "captions": uniformity(texts)},
                "modality_gap": modality_gap(images, texts),
            },
            items=_items("t2i", t2i, self._query_names(), clusters["t2i"], rule)
            + _items("i2t", i2t, names, names, rule),
            examples=self._examples(t2i, i2t, embedder, rule),
            protocol={"captions_sha256": digest(repr([(n, *self._captions(i)) for i, n in enumerate(names)]))},
        )

    def _captions(self, picture: int) -> list[str]:
        return [self.texts[w] for w in self.written[self.owner == picture]]

    def _query_names(self) -> list[str]:
        seen: dict[int, int] = defaultdict(int)
        names = []
        for owner in self.owner.tolist():
            names.append(f"{self.pictures[owner].src}:{self.pictures[owner].path}#{seen[owner]}")
            seen[owner] += 1
        return names

    def _examples(self, t2i: Ranks, i2t: Ranks, embedder: Embedder, rule: Tie) -> list[dict[str, Any]]:
        captions, names, out = self._query_names(), [f"{p.src}:{p.path}" for p in self.pictures], []
        for q in pick(t2i.credit(1, rule).tolist(), 8):
            shown, scores = _shown(t2i, q)
            text = self.texts[self.written[q]]
            out.append(
                _example("t2i", captions[q], t2i, q, rule)
                | {
                    "pictures": [thumbnail(embedder, self.pictures[p]) for p in shown],
                    "texts": [text],
                    "scores": [[score] for score in scores],
                    "match": [[int(self.match[p, self.written[q]])] for p in shown],
                }
            )
        for p in pick(i2t.credit(1, rule).tolist(), 8):
            shown, scores = _shown(i2t, p)
            out.append(
                _example("i2t", names[p], i2t, p, rule)
                | {
                    "pictures": [thumbnail(embedder, self.pictures[p])],
                    "texts": [self.texts[t] for t in shown],
                    "scores": [scores],
                    "match": [[int(self.match[p, t]) for t in shown]],
                }
            )
        return out


class Captioned(NamedTuple):
    """A picture and all that is said of it."""

    picture: Picture
    captions: list[str]
    kinds: list[str]
    """One a caption; empty where none is named."""
    group: str
    """Pictures of one group are the same picture."""


def read(benchmark: Benchmark, roots: Roots) -> list[Captioned]:
    """All pictures of the benchmark's shards that have captions. Raises UserError for a broken pair, and for none."""
    found = []
    for reference in benchmark.shards:
        src, shards = split_reference(reference)
        src = roots.within(src, shards)
        for key, members in _pairs(roots.paths(src)).items():
            picture = next((members[suffix] for suffix in PICTURES if suffix in members), None)
            if picture is None or members.keys().isdisjoint(SHEETS):
                continue
            try:
                sheet = read_sheet({s: roots.read(src, members[s]) for s in SHEETS if s in members})
            except Unreadable as error:
                raise UserError(f"{src}:{key}: {error}") from None
            usable = sheet.usable()
            captions = [benchmark.prefix + sheet.captions[c] for c in usable]
            kinds, group = [sheet.caption_kinds[c] for c in usable], sheet.group or f"{src}:{key}"
            found.append(Captioned(Picture(src, picture), captions, kinds, group))
    if not found:
        raise UserError(f"no pictures with captions in {', '.join(benchmark.shards)}")
    return found


def prepare(benchmark: Benchmark, roots: Roots, allow_missing: bool = False) -> Retrieval:
    """Read pictures and captions from shards (or a folder of the same form). Raises UserError for a broken pair."""
    found = read(benchmark, roots)
    pictures, captions, groups = [f.picture for f in found], [f.captions for f in found], [f.group for f in found]
    texts = list(dict.fromkeys(text for several in captions for text in several))
    number = {text: n for n, text in enumerate(texts)}
    written = np.array([number[text] for several in captions for text in several])
    owner = np.repeat(np.arange(len(pictures)), [len(several) for several in captions])
    # Pictures of one group are the same picture: what is right for one is right for all.
    same = np.unique(np.array(groups), return_inverse=True)[1]
    by_group = np.zeros((same.max() + 1, len(texts)), dtype=bool)
    by_group[same[owner], written] = True
    coverage = {"share": 1.0, "rows": len(written), "missing": {}}
    return Retrieval(benchmark, pictures, texts, written, owner, by_group[same], coverage)


def rank(
    queries: Float[Array, "n d"], gallery: Float[Array, "m d"], match: Bool[Array, "n m"], shown: int = 4
) -> Ranks:
    """Ranks of each query's best right answer among the wrong ones, block by block."""
    parts: list[tuple[Array, ...]] = []
    answers = gallery.T.astype(np.float64)
    for at in range(0, len(queries), BLOCK):
        # fp64 inside: equal inputs must tie exactly wherever they stand in the product.
        s = (queries[at : at + BLOCK].astype(np.float64) @ answers).astype(np.float32)
        right = match[at : at + BLOCK]
        own = np.where(right, s, -np.inf)
        best = own.max(1)
        wrong = np.where(right, -np.inf, s)
        first = np.argsort(-s, axis=1, kind="stable")[:, :shown]
        better, equal = (wrong > best[:, None]).sum(1), (wrong == best[:, None]).sum(1)
        parts.append((better, equal, right.sum(1), first, np.take_along_axis(s, first, 1), own.argmax(1), best))
    return Ranks(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _metrics(direction: str, ranks: Ranks, gallery: int, clusters: list[str], tie: Tie) -> dict[str, Metric]:
    resampler, everyone = Resampler(clusters), np.ones(len(clusters), dtype=bool)
    out = {}
    for k in KS:
        guess = np.array([_guess(gallery, right, k) for right in ranks.right.tolist()])
        values = mean_interval(ranks.credit(k, tie), [(1.0, everyone)], resampler)
        out[f"{direction}/r{k}"] = Metric(*values, len(clusters), float(guess.mean()))
    places = ranks.rank(tie)
    draws = median(places, resampler.rows(np.arange(len(places))))
    guess = float(np.median(gallery * (1 - 0.5 ** (1 / ranks.right)))) + 0.5
    out[f"{direction}/median_rank"] = Metric(float(np.median(places)), *interval(draws), len(places), guess)
    return out


def _guess(gallery: int, right: int, k: int) -> float:
    """How likely k answers drawn blindly hold one of the right ones."""
    return 1.0 if k >= gallery else 1 - comb(gallery - right, k) / comb(gallery, k)


def _items(direction: str, ranks: Ranks, names: list[str], clusters: list[str], tie: Tie) -> list[dict[str, Any]]:
    credit, places = ranks.credit(1, tie), ranks.rank(tie)
    return [
        {
            "id": f"{direction}/{name}",
            "category": direction,
            "cluster": clusters[q],
            "correct": float(credit[q]),
            "rank": float(places[q]),
        }
        for q, name in enumerate(names)
    ]


def _example(direction: str, name: str, ranks: Ranks, q: int, tie: Tie) -> dict[str, Any]:
    return {
        "id": f"{direction}/{name}",
        "category": direction,
        "correct": float(ranks.credit(1, tie)[q]),
        "form": direction,
        "rank": float(ranks.rank(tie)[q]),
        "choice": [0],
    }


def _shown(ranks: Ranks, q: int) -> tuple[list[int], list[float]]:
    """The highest answers, the best right one among them, and their similarities."""
    answers, scores = ranks.first[q].tolist(), ranks.similarity[q].tolist()
    if ranks.own[q] not in answers:
        answers[-1], scores[-1] = int(ranks.own[q]), float(ranks.own_similarity[q])
    return answers, scores


def _taken(ranks: Ranks, queries: Int[Array, " q"]) -> Ranks:
    """The ranks of these queries (a caption written twice asks twice)."""
    return Ranks(*(getattr(ranks, name)[queries] for name in Ranks.__dataclass_fields__))


def _pairs(paths: list[str]) -> dict[str, dict[str, str]]:
    """Key -> suffix -> path; a key is the path without its last suffix."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in paths:
        key, _, suffix = path.rpartition(".")
        found[key][suffix.lower()] = path
    return found
