"""What stored negatives are worth: how many, of which kinds, how long, and how well the text alone tells them.

`audit` measures, `balance` (balancing.py) leaves out negatives until the text tells little, `page` (page.py) shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import numpy as np

from clipkit.negatives.audit import blind
from clipkit.negatives.audit.stored import Stored

ALL = "all"
"""Name of all kinds together."""
CUES = 12
"""Most telling cues listed of each kind."""
SAMPLES = 30
"""Negatives of each kind to look at."""
_SHOWN = 3.0
"""Standard errors by which a cue's two shares differ before it is listed."""


@dataclass(frozen=True)
class Cue:
    """A word, or a pair of neighbours (^ and $ are the ends), with the share of negatives and of captions with it."""

    cue: str
    negatives: float
    captions: float


@dataclass(frozen=True)
class Sample:
    """A negative beside its caption."""

    caption: str
    text: str
    source: str


@dataclass(frozen=True)
class Told:
    """How well the text alone tells negatives from their captions, held out.

    `auc` is over all texts, `low` and `high` its 95 % interval over pictures; `pairs` is the share of negatives that
    are told from their own caption.
    """

    auc: float
    low: float
    high: float
    pairs: float


@dataclass(frozen=True)
class Kind:
    """One kind of negatives, or all. `covered` is the share of captions with one, words are means.

    `kept` is the share of candidates that passed the filters, where the ledger of `negatives make` tells.
    """

    count: int
    covered: float
    words: float
    caption_words: float
    kept: float | None
    told: Told
    cues: list[Cue]
    samples: list[Sample]


@dataclass(frozen=True)
class Audit:
    """The findings by kind, `all` first; `dropped` counts candidates by kind and reason, from the ledgers."""

    captions: int
    pictures: int
    kinds: dict[str, Kind]
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain names and numbers."""
        return asdict(self)

    def rows(self) -> list[tuple[Any, ...]]:
        """(kind, negatives, captions with one, words, the captions' words, candidates kept, AUC, interval, pairs)."""
        return [
            (
                name, kind.count, f"{kind.covered:.1%}", f"{kind.words:.1f}", f"{kind.caption_words:.1f}",
                "" if kind.kept is None else f"{kind.kept:.1%}", f"{kind.told.auc:.3f}",
                f"{kind.told.low:.3f} to {kind.told.high:.3f}", f"{kind.told.pairs:.1%}",
            )
            for name, kind in self.kinds.items()
        ]  # fmt: skip


def audit(stored: Stored, *, seed: int = 0) -> Audit:
    """Measure stored negatives; `seed` draws folds and samples."""
    cues = blind.cues_of([*stored.captions, *stored.texts])
    kinds = {}
    for name in (ALL, *stored.kinds_by_count()):
        chosen = stored.of_kind(None if name == ALL else name)
        kinds[name] = _kind(stored, cues, name, chosen, seed)
    pictures = len(set(stored.pictures))
    dropped = {kind: dict(reasons) for kind, reasons in stored.dropped.items()}  # asdict cannot copy a Counter
    return Audit(len(stored.captions), pictures, kinds, dropped)


@dataclass(frozen=True)
class Reading:
    """What the held-out classifiers say of some negatives: each one's logit above its caption's, and the sum of it."""

    told: Told
    lead: np.ndarray


def read_blindly(
    stored: Stored,
    cues: blind.Cues,
    chosen: np.ndarray,
    seed: int,
    measured: bool = True,
    weight: np.ndarray | None = None,
) -> Reading:
    """Tell the chosen negatives (numbers) from their captions, those weighed by their negatives; folds by picture.

    `weight`: what each of the chosen counts; above 0, default 1. Without `measured` the interval, which takes its time,
    is left out (equal to the AUC).
    """
    weight = np.ones(len(chosen)) if weight is None else weight
    times = np.bincount(stored.owner[chosen], weight, minlength=len(stored.captions))
    captions = np.flatnonzero(times)
    rows = np.concatenate([captions, len(stored.captions) + chosen])
    labels = np.arange(len(rows)) >= len(captions)
    weights = np.concatenate([times[captions], weight])
    owners = np.concatenate([captions, stored.owner[chosen]])
    folds = blind.folds_of([stored.pictures[c] for c in owners], seed)
    logits = blind.held_out(cues, rows, labels, weights, folds)
    value = float(blind.auc_over(logits, labels, weights, folds))
    low = high = value
    if measured:
        _, numbers = np.unique([stored.pictures[c] for c in owners], return_inverse=True)
        low, high = blind.interval(logits, labels, weights, folds, numbers, seed)
    of_caption = np.zeros(len(stored.captions))
    of_caption[captions] = logits[: len(captions)]
    lead = logits[len(captions) :] - of_caption[stored.owner[chosen]]
    told = np.average((lead > 0) + (lead == 0) / 2, weights=weight)
    return Reading(Told(value, low, high, float(told)), lead)


def _kind(stored: Stored, cues: blind.Cues, name: str, chosen: np.ndarray, seed: int) -> Kind:
    texts = [stored.texts[n] for n in chosen]
    captions = [stored.captions[stored.owner[n]] for n in chosen]
    made = stored.counts(name == ALL, name)
    drawn = Random(f"{seed}:{name}").sample(range(len(chosen)), min(SAMPLES, len(chosen)))
    return Kind(
        count=len(chosen),
        covered=len(set(stored.owner[chosen].tolist())) / max(len(stored.captions), 1),
        words=_mean_words(texts),
        caption_words=_mean_words(captions),
        kept=made[0] / sum(made) if sum(made) else None,
        told=read_blindly(stored, cues, chosen, seed).told,
        cues=_telling(stored, cues, chosen),
        samples=[Sample(captions[i], texts[i], stored.sources[chosen[i]]) for i in drawn],
    )


def _mean_words(texts: Sequence[str]) -> float:
    return sum(len(text.split()) for text in texts) / max(len(texts), 1)


def _telling(stored: Stored, cues: blind.Cues, chosen: np.ndarray) -> list[Cue]:
    """The words and pairs whose share of negatives differs from that of captions by the most standard errors."""
    ones = np.ones(len(chosen))
    ours = cues.count(len(stored.captions) + chosen, ones) / len(chosen)
    theirs = cues.count(stored.owner[chosen], ones) / len(chosen)
    spread = np.sqrt((ours * (1 - ours) + theirs * (1 - theirs) + 1 / len(chosen)) / len(chosen))
    signs = np.abs(ours - theirs) / spread
    found = []
    for number in np.argsort(-signs, kind="stable"):
        if signs[number] < _SHOWN or len(found) == CUES:
            break
        if not cues.names[number].startswith("…"):
            found.append(Cue(cues.names[number], float(ours[number]), float(theirs[number])))
    return found
