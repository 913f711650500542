"""Whether the text alone tells negatives from captions: logistic regression over words, their pairs, letters, lengths.

What such a classifier finds, a text tower can learn in place of what the picture shows. Rows are texts; V columns are
cues, each there or not.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np

FOLDS = 5
"""Every text is scored by a classifier that saw no text of its picture: one of so many."""
LEAST = 3
"""Cues that fewer texts hold are left out."""
RIDGE = 1e-3
"""Weight of the squared weights beside the mean loss: what held-out texts of real captions are told best with."""
STEPS = 40
"""Steps of L-BFGS, more than it needs."""
DRAWS = 200
"""Resamples of the pictures behind an interval."""

_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Cues:
    """The cues of n texts: those of text i are index[start[i] : start[i + 1]]; `names` has one name a column."""

    index: np.ndarray
    start: np.ndarray
    names: list[str]

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index, start without the end) of some rows."""
        lengths = self.start[rows + 1] - self.start[rows]
        start = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.start[rows] - start[:-1], lengths) + np.arange(start[-1])
        return self.index[places], start[:-1]

    def count(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """How much weight of these rows each cue is in: V."""
        index, start = self.of(rows)
        lengths = np.diff(np.append(start, len(index)))
        return np.bincount(index, np.repeat(weights, lengths), len(self.names))


def cues_of(texts: Sequence[str], least: int = LEAST) -> Cues:
    """The cues that at least so many texts hold."""
    numbers: dict[str, int] = {}
    index, start = array("i"), array("q", [0])
    for text in texts:
        index.extend({numbers.setdefault(cue, len(numbers)) for cue in _cues(text)})
        start.append(len(index))
    found, ends = np.frombuffer(index, np.int32), np.frombuffer(start, np.int64)
    kept = np.bincount(found, minlength=len(numbers)) >= least
    before = np.concatenate([[0], np.cumsum(kept[found])])
    column = np.cumsum(kept) - 1
    names = [name for name, keep in zip(numbers, kept) if keep]
    return Cues(column[found[kept[found]]], before[ends], names)


def _cues(text: str) -> Iterator[str]:
    """Words, pairs of neighbours, three and four letters as they are written, and two lengths."""
    words = ["^", *_WORD.findall(text.lower()), "$"]
    yield from words[1:-1]
    yield from map(" ".join, pairwise(words))
    letters = f"\n{text}\n"
    for size in (3, 4):
        yield from (f"…{letters[i : i + size]}…" for i in range(len(letters) - size + 1))
    yield f"{len(words) - 2} words"
    yield f"{len(text) // 5 * 5} letters or more"


def fit(cues: Cues, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Weights of the cues and, last, the intercept (V + 1): logistic regression, both labels of equal mass."""
    import torch

    index, start = cues.of(rows)
    lengths = np.diff(np.append(start, len(index)))
    sign = np.where(labels, 1.0, -1.0)
    mass = np.where(labels, weights / weights[labels].sum(), weights / weights[~labels].sum()) / 2
    slope = torch.zeros(len(cues.names) + 1, dtype=torch.float64)
    slope.grad = torch.zeros_like(slope)
    solver = torch.optim.LBFGS([slope], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> float:
        assert slope.grad is not None
        at = slope.numpy()
        margin = sign * (_sums(at[index], start) + at[-1])
        pull = -sign * mass * np.exp(-np.logaddexp(0.0, margin))  # of each logit
        gradient = np.bincount(index, np.repeat(pull, lengths), len(at)) + ridge * at
        gradient[-1] = pull.sum()
        slope.grad.copy_(torch.from_numpy(gradient))
        return float(mass @ np.logaddexp(0.0, -margin) + ridge / 2 * (at[:-1] @ at[:-1]))

    solver.step(loss)
    return slope.numpy()


def _sums(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The sums of values[start[i] : start[i + 1]]; every text has two cues at least, its lengths."""
    return np.add.reduceat(values, start)


def score(cues: Cues, rows: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Logits of rows."""
    index, start = cues.of(rows)
    return _sums(slope[index], start) + slope[-1]


def folds_of(pictures: Sequence[str], seed: int = 0) -> np.ndarray:
    """A fold for each picture's name; the texts of one picture share it."""
    known = {p: blake2b(f"{seed}:{p}".encode(), digest_size=4).digest() for p in set(pictures)}
    return np.array([int.from_bytes(known[p], "big") % FOLDS for p in pictures], np.int64)


def held_out(cues: Cues, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Logits of `rows`, each by a classifier fitted on the other folds. All arrays but `cues` have one entry a row."""
    logits = np.zeros(len(rows))
    for fold in np.unique(folds):
        out = folds == fold
        if labels[~out].all() or not labels[~out].any():
            continue
        slope = fit(cues, rows[~out], labels[~out], weights[~out])
        logits[out] = score(cues, rows[out], slope)
    return logits


def auc(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The chance that a text with label true is scored above one with false, ties half; `weights` may be [draws, n].

    0.5 where a label is missing.
    """
    order = np.argsort(logits, kind="stable")
    first = np.flatnonzero(np.diff(logits[order], prepend=-np.inf) > 0)
    each = np.atleast_2d(weights)[:, order]
    above = np.add.reduceat(np.where(labels[order], each, 0.0), first, axis=1)
    below = np.add.reduceat(np.where(labels[order], 0.0, each), first, axis=1)
    won = (above * (np.cumsum(below, 1) - below / 2)).sum(1)
    total = above.sum(1) * below.sum(1)
    return np.where(total > 0, won / np.where(total > 0, total, 1.0), 0.5).reshape(np.shape(weights)[:-1])


def auc_over(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """The mean of the folds' AUC: logits of different classifiers are not compared."""
    parts = [auc(logits[here], labels[here], weights[..., here]) for here in (folds == f for f in np.unique(folds))]
    return np.mean(parts, axis=0)


def interval(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, folds: np.ndarray, pictures: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of `auc_over` when pictures (numbers from 0) are drawn anew."""
    rng = np.random.default_rng(seed)
    times = rng.poisson(1.0, (DRAWS, int(pictures.max()) + 1))
    drawn = auc_over(logits, labels, weights * times[:, pictures], folds)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
