"""Compositional benchmarks: rows of pictures × texts, scored from one similarity matrix a row.

Axes: n rows, r rows of one form, i pictures and t texts of a row, p unique pictures, q unique texts, d embedding.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Benchmark, Picture, Row, read_rows
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.judged import Pairs, decide, extremes
from clipkit.evaluation.result import (
    Metric,
    Result,
    begin,
    digest,
    furthest_wrong,
    headline,
    pick,
    policy,
    thumbnail,
    wrong_by,
)
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.scores import SCORES, Pattern, Tie, binary, binary_auroc, main_score, pattern, tot
from clipkit.evaluation.stats import deranged, interval, wilson
from clipkit.evaluation.table import Credits, Table

Array = np.ndarray
Similarities = Callable[[Int[Array, "r i"], Int[Array, "r t"]], Float[Array, "r i t"]]
"""Similarities of pictures and texts given by their numbers."""


@dataclass
class Form:
    """All rows with one match pattern."""

    match: Pattern
    rows: Int[Array, " r"]
    s: Float[Array, "r i t"]
    texts: Float[Array, "r t t"] | None = None
    """Similarities among the texts, where the form asks for them."""


@dataclass
class Compositional:
    """A compositional benchmark ready to be scored."""

    benchmark: Benchmark
    rows: list[Row]
    categories: set[str]
    coverage: dict[str, Any]
    pictures: list[Picture]
    texts: list[str]

    def score(self, embedder: Embedder, tie: str) -> Result:
        """Metrics, breakdowns, blind baselines, items and examples."""
        images, texts = embedder.pictures(self.pictures), embedder.texts(self.texts)
        rule, table = policy(self.benchmark, tie), Table(self.benchmark, self.rows, self.categories)
        forms = self._forms(partial(similarity, images, texts), partial(similarity, texts, texts))
        credits, tied = judge(forms, self.rows, rule)
        pairs = self._pairs(forms)
        if pairs:
            cut, on_cut = decide(pairs, self.rows, rule)
            credits, tied = credits | cut, tied | on_cut
        correct, credits = credits["accuracy"], _needed(credits)
        metrics, by_category = table.metrics(credits) | areas(forms, table, rule), table.by("category", credits)
        if pairs:
            further, by = extremes(pairs, credits, table, rule)
            metrics |= further
            by_category = {name: scores | by.get(name, {}) for name, scores in by_category.items()}
        top = headline(self.benchmark, metrics, _default_headline(credits))
        main = credits.get(top.partition("/")[0], correct)
        correct = np.where(np.isnan(main), correct, main)
        return begin(
            self.benchmark,
            n=len(self.rows),
            headline=top,
            metrics=metrics,
            by_category=by_category,
            breakdowns={name: table.by(name, credits) for name in self.benchmark.breakdowns},
            baselines=self._baselines(table, images, texts),
            tie={"policy": tie, "rule": rule} | _tie_rates(tied, credits, top.partition("/")[0]),
            coverage=self.coverage,
            items=self._items(forms, credits, correct),
            examples=self._examples(forms, correct, embedder),
            protocol={"rows_sha256": digest("\n".join(row.model_dump_json() for row in self.rows))},
        )

    def _pairs(self, forms: list[Form]) -> Pairs | None:
        return Pairs.of([(form.match, form.rows, form.s) for form in forms]) if self.benchmark.thresholds else None

    @cached_property
    def _layout(self) -> list[tuple[Pattern, Int[Array, " r"], Int[Array, "r i"], Int[Array, "r t"]]]:
        """The rows sorted by form, with the numbers of their pictures and texts."""
        picture, text = _numbered(self.pictures), _numbered(self.texts)
        found: dict[Pattern, list[int]] = defaultdict(list)
        for number, row in enumerate(self.rows):
            found[pattern(row.match)].append(number)
        layout = []
        for match, numbers in found.items():
            i = np.array([[picture[p] for p in self.rows[n].pictures] for n in numbers])
            t = np.array([[text[x] for x in self.rows[n].texts] for n in numbers])
            layout.append((match, np.array(numbers), i, t))
        return layout

    def _forms(self, pairs: Similarities, among: Similarities | None = None) -> list[Form]:
        """Similarities by form; `among` gives those of texts, for the forms with several right ones."""
        return [
            Form(match, rows, pairs(i, t), among(t, t) if among and match[0].count(1) > 1 else None)
            for match, rows, i, t in self._layout
        ]

    def _baselines(self, table: Table, images: Float[Array, "p d"], texts: Float[Array, "q d"]) -> dict[str, Any]:
        """Scores of what cannot understand, ties as coin tosses. Where one is high, the benchmark gives itself away."""
        characters = np.array([-len(text) for text in self.texts], dtype=np.float32)
        words = np.array([-len(text.split()) for text in self.texts], dtype=np.float32)
        prior = np.broadcast_to(images.mean(0), images.shape)
        kinds: dict[str, tuple[str, Similarities]] = {
            "shorter_text": ("the text with fewer characters is right", partial(_of_text, characters)),
            "fewer_words": ("the text with fewer words is right", partial(_of_text, words)),
            "text_prior": ("the text nearest to the mean picture is right", partial(similarity, prior, texts)),
            "shuffled_pictures": (
                "the model, shown other pictures of the benchmark",
                partial(similarity, images[deranged(len(images))], texts),
            ),
        }
        return {name: {"title": title} | self._blind(table, of) for name, (title, of) in kinds.items()}

    def _blind(self, table: Table, similarities: Similarities) -> dict[str, Any]:
        forms = self._forms(similarities)
        credits = _needed(judge(forms, self.rows, "half")[0])
        area = {name: metric.value for name, metric in areas(forms, table, "half").items()}
        return {"metrics": table.values(credits) | area, "by_category": table.values_by("category", credits)}

    def _items(self, forms: list[Form], credits: Credits, correct: Array) -> list[dict[str, Any]]:
        scores = {int(row): s for form in forms for row, s in zip(form.rows, form.s, strict=True)}
        return [
            {
                "id": row.id,
                "category": row.category,
                "cluster": row.cluster,
                "correct": float(correct[n]),
                "decisions": {name: float(credit[n]) for name, credit in credits.items() if not np.isnan(credit[n])},
                "scores": scores[n].tolist(),
            }
            for n, row in enumerate(self.rows)
        ]

    def _examples(self, forms: list[Form], correct: Array, embedder: Embedder) -> list[dict[str, Any]]:
        scores = {int(row): s for form in forms for row, s in zip(form.rows, form.s, strict=True)}
        gaps = [wrong_by(scores[n].tolist(), row.match) for n, row in enumerate(self.rows)]
        worst = furthest_wrong(correct.tolist(), gaps)
        return [
            {
                "id": self.rows[n].id,
                "category": self.rows[n].category,
                "correct": float(correct[n]),
                "form": main_score(pattern(self.rows[n].match)),
                "pictures": [thumbnail(embedder, picture) for picture in self.rows[n].pictures],
                "texts": self.rows[n].texts,
                "scores": scores[n].tolist(),
                "match": self.rows[n].match,
                "choice": _choice(pattern(self.rows[n].match), scores[n], float(correct[n])),
                "worst": n in worst,
            }
            for n in pick(correct.tolist(), wrong_by=gaps)
        ]


def prepare(benchmark: Benchmark, roots: Roots, allow_missing: bool = False) -> Compositional:
    """Read the rows and look for their pictures.

    Raises UserError that counts the missing pictures by source, unless `allow_missing`: then rows that lack one are
    left out and `coverage` says how many.
    """
    everything = read_rows(benchmark, roots)
    rows = [row for row in everything if row.valid]
    pictures, absent, problem = look_for_pictures(rows, roots)
    if problem and not allow_missing:
        raise UserError(problem)
    missing = Counter(picture.src for picture in absent)
    kept = [row for row in rows if absent.isdisjoint(row.pictures)]
    if not kept:
        raise UserError(f"no row is left of {len(rows)}: all their pictures are missing")
    return Compositional(
        benchmark,
        kept,
        {row.category for row in everything},
        {"share": len(kept) / len(rows), "rows": len(rows), "missing": dict(missing)},
        [picture for picture in pictures if picture not in absent],
        list(dict.fromkeys(text for row in kept for text in row.texts)),
    )


def look_for_pictures(rows: list[Row], roots: Roots) -> tuple[list[Picture], set[Picture], str]:
    """(pictures of the rows, the absent ones, what to tell of them: how many of which source and what that is)."""
    pictures = list(dict.fromkeys(picture for row in rows for picture in row.pictures))
    absent = {picture for picture in pictures if not roots.has(picture.src, picture.path)}
    if not absent:
        return pictures, absent, ""
    missing = Counter(picture.src for picture in absent)
    counts = "; ".join(f"{count} of {roots.describe(src)}" for src, count in sorted(missing.items()))
    return pictures, absent, f"{len(absent)} of {len(pictures)} pictures are missing: {counts}"


def similarity(
    images: Float[Array, "p d"], texts: Float[Array, "q d"], i: Int[Array, "r i"], t: Int[Array, "r t"]
) -> Float[Array, "r i t"]:
    """Cosines as fp32, summed in fp64 so that equal inputs give equal similarities wherever they stand in a batch."""
    parts = [
        np.einsum("rid,rtd->rit", images[i[at : at + 256]], texts[t[at : at + 256]], dtype=np.float64)
        for at in range(0, len(i), 256)
    ]
    return np.concatenate(parts).astype(np.float32)


def judge(forms: list[Form], rows: list[Row], tie: Tie) -> tuple[Credits, dict[str, Bool[Array, " n"]]]:
    """Credit and ties of every row under every score that suits some; `accuracy` takes each row by its own form."""
    credits: Credits = defaultdict(lambda: np.full(len(rows), np.nan))
    tied: dict[str, Bool[Array, " n"]] = defaultdict(lambda: np.zeros(len(rows), dtype=bool))
    for form in forms:
        for name in SCORES:
            if decision := SCORES[name](form.s, form.match, tie=tie):
                credits[name][form.rows], tied[name][form.rows] = decision
        if form.texts is not None and (decision := tot(form.texts, form.match, tie=tie)):
            credits["tot"][form.rows], tied["tot"][form.rows] = decision
    if found := _true_or_false(forms):
        numbers, s, labels = found
        clusters = [rows[n].cluster for n in numbers]
        credits["binary"][numbers], tied["binary"][numbers] = binary(s, labels, clusters, tie=tie)
    for form in forms:
        main = main_score(form.match)
        credits["accuracy"][form.rows] = credits[main][form.rows]
        tied["accuracy"][form.rows] = tied[main][form.rows]
    return dict(credits), dict(tied)


def areas(forms: list[Form], table: Table, tie: Tie) -> dict[str, Metric]:
    """AUROC of the true/false rows, where both answers occur."""
    found = _true_or_false(forms)
    if found is None or found[2].all() or not found[2].any():
        return {}
    numbers, s, labels = found
    value = float(binary_auroc(s, labels, tie=tie)[0])
    draws = binary_auroc(s, labels, table.resampler.rows(numbers), tie=tie)
    bounds = interval(draws) if np.ptp(draws[~np.isnan(draws)]) else wilson(value * len(s), len(s))
    return {"auroc/micro": Metric(value, *bounds, len(s), 0.5)}


def _true_or_false(forms: list[Form]) -> tuple[Int[Array, " n"], Float[Array, " n"], Bool[Array, " n"]] | None:
    """(rows, similarities, labels) of all rows that ask true or false."""
    asked = [form for form in forms if main_score(form.match) == "binary"]
    if not asked:
        return None
    labels = np.concatenate([np.full(len(form.rows), form.match[0][0] == 1) for form in asked])
    return np.concatenate([f.rows for f in asked]), np.concatenate([f.s[:, 0, 0] for f in asked]), labels


def _default_headline(credits: Credits) -> str:
    """The score that all rows have, group before its parts; for rows of mixed forms each by its own."""
    suits_all = [
        name for name in ("group", "i2t", "t2i", "binary") if name in credits and not np.isnan(credits[name]).any()
    ]
    return f"{suits_all[0]}/micro" if suits_all else "accuracy/micro"


def _needed(credits: Credits) -> Credits:
    """Without `accuracy` where it only repeats the one score that all rows have."""
    repeated = any(np.array_equal(c, credits["accuracy"]) for name, c in credits.items() if name != "accuracy")
    return {name: credit for name, credit in credits.items() if name != "accuracy" or not repeated}


def _tie_rates(tied: dict[str, Bool[Array, " n"]], credits: Credits, headline: str) -> dict[str, Any]:
    rates = {name: float(tied[name][~np.isnan(credit)].mean()) for name, credit in credits.items()}
    return {"rate": rates.get(headline, rates[next(iter(rates))]), "by_score": rates}


def _choice(match: Pattern, s: Float[Array, "i t"], correct: float) -> list[int]:
    """What the model chose: a text for each picture; for t2i a picture for each text; for true/false 1 or 0."""
    form = main_score(match)
    if form == "binary":
        return [int((match[0][0] == 1) == (correct == 1))]
    return (s.argmax(0) if form == "t2i" else s.argmax(1)).tolist()


def _of_text(values: Float[Array, " q"], i: Int[Array, "r i"], t: Int[Array, "r t"]) -> Float[Array, "r i t"]:
    """A similarity that looks at the text alone."""
    return np.repeat(values[t][:, None, :], i.shape[1], axis=1)


def _numbered(items: Iterable[Hashable]) -> dict[Hashable, int]:
    return {item: number for number, item in enumerate(items)}
