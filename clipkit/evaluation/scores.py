"""Scores: from the similarities of a row's pictures and texts to right or wrong.

Axes: r rows of one form, i pictures, t texts. A score sees all rows of one form (`match` pattern) at once and gives
each a credit between 0 and 1, or None where the form does not suit it. Equal similarities are a tie: wrong under
`strict`, right under `lenient`, and under `half` worth what tossing among the tied would win; two rules of official
scripts give it to the `first` or the `last` of the equals, in the row's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, product
from math import comb, prod
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from clipkit.evaluation.stats import auroc, halves
from clipkit.registry import SCORES, score

Array = np.ndarray
Tie = Literal["strict", "lenient", "half", "first", "last"]
WORTH: dict[Tie, float] = {"strict": 0.0, "half": 0.5, "lenient": 1.0, "first": 0.0, "last": 0.0}
"""Of a tie with a threshold, or between rows, which have no order."""
Pattern = tuple[tuple[int | None, ...], ...]
"""A match matrix, images × texts, of 1, 0, None."""


class Decision(NamedTuple):
    """What a score says of each row."""

    credit: Float[Array, " r"]
    tied: Bool[Array, " r"]


def _choose(
    right: Float[Array, "r p"],
    wrong: Float[Array, "r q"],
    tie: Tie,
    everyone: bool,
    places: tuple[Sequence[int], Sequence[int]] | None = None,
) -> tuple[Float[Array, " r"], Bool[Array, " r"]]:
    """One decision: best (or with `everyone` worst) right candidate against the best wrong one.

    `places`: where the right and the wrong ones stand in the row; by default the right ones stand first.
    """
    mine = (right.min(1) if everyone else right.max(1))[:, None]
    best = wrong.max(1)[:, None]
    tied = (mine == best)[:, 0]
    if tie in ("first", "last"):
        ours, theirs = places or (range(right.shape[1]), range(right.shape[1], right.shape[1] + wrong.shape[1]))
        sign = 1 if tie == "first" else -1  # who stands nearer to the end that wins
        mine_at, theirs_at = sign * np.array(ours), sign * np.array(theirs)
        far = float(len(ours) + len(theirs))
        nearest = np.where(right == mine, mine_at, far).min(1)
        farthest = np.where(right == mine, mine_at, -far).max(1)  # everyone: the worst placed of the tied right ones
        before = (farthest if everyone else nearest) < np.where(wrong == best, theirs_at, far).min(1)
        return np.where(tied, before, (mine > best)[:, 0]).astype(np.float64), tied
    if tie == "half":
        p, q = (right == mine).sum(1), (wrong == best).sum(1)
        toss = np.array([1 / comb(a + b, a) if everyone else a / (a + b) for a, b in zip(p, q, strict=True)])
        share = np.where(tied, toss, 0.0)
    else:
        share = tied * float(tie == "lenient")
    return np.where(tied, share, (mine > best)[:, 0].astype(np.float64)), tied


def _by_picture(s: Float[Array, "r i t"], match: Pattern, tie: Tie, everyone: bool = False) -> Decision | None:
    """Every picture picks a text; the row is right when all pictures are."""
    credit, tied = np.ones(len(s)), np.zeros(len(s), dtype=bool)
    for picture, judged in enumerate(match):
        right = [t for t, m in enumerate(judged) if m == 1]
        wrong = [t for t, m in enumerate(judged) if m == 0]
        if not right or not wrong:
            return None
        one, equal = _choose(s[:, picture, right], s[:, picture, wrong], tie, everyone, (right, wrong))
        credit, tied = credit * one, tied | equal
    return Decision(credit, tied)


def pattern(match: list[list[Literal[0, 1] | None]]) -> Pattern:
    """A row's match matrix as a key."""
    return tuple(tuple(line) for line in match)


def transposed(match: Pattern) -> Pattern:
    """Texts × images."""
    return tuple(zip(*match, strict=True))


@score()
def i2t(s: Float[Array, "r i t"], match: Pattern, *, tie: Tie = "strict") -> Decision | None:
    """Each picture finds a right text above all wrong ones (Winoground's text score; 1×k choice; BiVLC's I2T)."""
    return _by_picture(s, match, tie)


@score()
def t2i(s: Float[Array, "r i t"], match: Pattern, *, tie: Tie = "strict") -> Decision | None:
    """Each text finds a right picture above all wrong ones (Winoground's image score; COLA; SVO-Probes)."""
    return _by_picture(s.transpose(0, 2, 1), transposed(match), tie)


@score()
def group(s: Float[Array, "r i t"], match: Pattern, *, tie: Tie = "strict") -> Decision | None:
    """i2t and t2i both (Winoground's group score, arXiv 2204.03162)."""
    text, image = i2t(s, match, tie=tie), t2i(s, match, tie=tie)
    return Decision(text.credit * image.credit, text.tied | image.tied) if text and image else None


@score()
def i2t_all(s: Float[Array, "r i t"], match: Pattern, *, tie: Tie = "strict") -> Decision | None:
    """Each picture puts all its right texts above all wrong ones (SugarCrepe++'s ITT); only where it has several."""
    several = any(line.count(1) > 1 for line in match)
    return _by_picture(s, match, tie, everyone=True) if several else None


@score()
def ap(s: Float[Array, "r i t"], match: Pattern, *, tie: Tie = "strict") -> Decision | None:
    """Average precision of the pictures that a text is right of, among three or more (COLA's single objects).

    Under `half` equals share one place, as in the usual estimator: all of them count in the precision of each. Under
    `strict` a right picture that equals a wrong one adds nothing, under `lenient` it stands before it.
    """
    column = [line[0] for line in match]
    right, wrong = ([i for i, m in enumerate(column) if m == which] for which in (1, 0))
    if len(match[0]) > 1 or not right or not wrong or len(right) + len(wrong) < 3:
        return None
    own, others = s[:, right, 0], s[:, wrong, 0]
    credit, tied = np.empty(len(s)), np.empty(len(s), dtype=bool)
    for n, (mine, theirs) in enumerate(zip(own, others, strict=True)):
        found = (mine >= mine[:, None]).sum(1)
        before, equal = (theirs > mine[:, None]).sum(1), (theirs == mine[:, None]).sum(1)
        if tie in ("lenient", "half"):
            precision = found / (found + before + equal * (tie == "half"))
        else:
            precision = np.where(equal > 0, 0.0, found / (found + before))
        credit[n], tied[n] = precision.mean(), (equal > 0).any()
    return Decision(credit, tied)


@score()
def same(s: Float[Array, "r i t"], match: Pattern, *, tie: Tie = "strict") -> Decision | None:
    """A picture decides alike whichever of its two right texts is set against the wrong ones (paraphrases)."""
    right = [t for t, m in enumerate(match[0]) if m == 1]
    wrong = [t for t, m in enumerate(match[0]) if m == 0]
    if len(match) > 1 or len(right) != 2 or not wrong:
        return None
    best = s[:, 0, wrong].max(1)
    first, second = (np.sign(s[:, 0, t] - best) for t in right)
    tied = (first == 0) | (second == 0)
    return Decision(np.where(tied, WORTH[tie], first == second).astype(np.float64), tied)


def judged(
    s: Float[Array, "r i t"], match: Pattern, thresholds: Float[Array, " r"], *, tie: Tie = "strict"
) -> dict[str, Decision] | None:
    """Pairs of a right and a wrong candidate, each said to fit or not by a threshold (VALSE's p_c, p_f and acc).

    `p_right`: the right one is above; `p_wrong`: the wrong one is not; `judged`: their mean. None for other forms.
    """
    flat = [m for line in match for m in line]
    if len(flat) != 2 or sorted(m is not None and m for m in flat) != [0, 1]:
        return None
    values = s.reshape(len(s), 2)
    right, wrong = values[:, flat.index(1)], values[:, flat.index(0)]
    at_right, at_wrong = right == thresholds, wrong == thresholds
    fits = np.where(at_right, WORTH[tie], right > thresholds)
    fails = np.where(at_wrong, WORTH[tie], wrong < thresholds)
    return {
        "p_right": Decision(fits, at_right),
        "p_wrong": Decision(fails, at_wrong),
        "judged": Decision((fits + fails) / 2, at_right | at_wrong),
    }


def tot(s: Float[Array, "r t t"], match: Pattern, *, tie: Tie = "strict") -> Decision | None:
    """Similarities of texts alone: right texts are nearer to each other than to any wrong one (SugarCrepe++'s TOT)."""
    pairs = _among_texts(match)
    if not pairs:
        return None
    right, wrong = (tuple(zip(*kind)) for kind in pairs)
    return Decision(*_choose(s[:, right[0], right[1]], s[:, wrong[0], wrong[1]], tie, everyone=True))


def _among_texts(match: Pattern) -> tuple[list[tuple[int, int]], list[tuple[int, int]]] | None:
    """(pairs of right texts, pairs of a right and a wrong one) of one picture; None without several right ones."""
    right = [t for t, m in enumerate(match[0]) if m == 1]
    wrong = [t for t, m in enumerate(match[0]) if m == 0]
    if len(match) > 1 or len(right) < 2 or not wrong:
        return None
    return list(combinations(right, 2)), list(product(right, wrong))


@lru_cache
def main_score(match: Pattern) -> str:
    """The score that suits a row's form: binary, i2t, t2i, or group where both directions are asked."""
    s = np.zeros((1, len(match), len(match[0])))
    text, image = i2t(s, match), t2i(s, match)
    if text and image:
        return "group"
    return "i2t" if text else "t2i" if image else "binary"


@lru_cache
def chance(match: Pattern, name: str) -> float:
    """Expected credit of independent random similarities, nan where the score does not suit the form.

    Exact for one direction and for 2×2 groups (the two right ones of four lead: 1/6), by simulation for larger groups.
    """
    if name == "tot":
        pairs = _among_texts(match)
        return 1 / comb(len(pairs[0]) + len(pairs[1]), len(pairs[0])) if pairs else float("nan")
    if SCORES[name](np.zeros((1, len(match), len(match[0]))), match) is None:
        return float("nan")
    if name == "same":  # both above, or both below, all the wrong ones: who is best decides, or both are last
        wrong = match[0].count(0)
        return 1 - 2 * wrong / ((wrong + 1) * (wrong + 2))
    if name == "ap":
        p, n = (sum(m in which for line in match for m in line) for which in ((1,), (0, 1)))
        harmonic = sum(1 / k for k in range(1, n + 1))
        return (harmonic + (p - 1) / (n - 1) * (n - harmonic)) / n
    if name == "group" and len(match) == len(match[0]) == 2:
        return 1 / 6
    if name == "group":
        draws = np.random.default_rng(0).random((100_000, len(match), len(match[0])))
        return float(group(draws, match).credit.mean())  # type: ignore[union-attr]
    lines = transposed(match) if name == "t2i" else match
    right, judged = [line.count(1) for line in lines], [line.count(1) + line.count(0) for line in lines]
    if name == "i2t_all":
        return prod(1 / comb(n, p) for p, n in zip(right, judged, strict=True))
    return prod(p / n for p, n in zip(right, judged, strict=True))


def binary(s: Float[Array, " n"], labels: Bool[Array, " n"], clusters: list[str], *, tie: Tie = "strict") -> Decision:
    """True/false rows (VSR): each half of the rows is judged at the threshold that suits the other half best.

    The best threshold on the rows themselves would flatter the model.
    """
    side, credit, tied = halves(clusters), np.zeros(len(s)), np.zeros(len(s), dtype=bool)
    for half in (0, 1):
        here, there = side == half, side != half
        fitted = there if there.any() else here
        threshold = best_threshold(s[fitted], labels[fitted])
        tied[here] = s[here] == threshold
        credit[here] = (s[here] > threshold) == labels[here]
    credit[tied] = WORTH[tie]
    return Decision(credit, tied)


def best_threshold(s: Float[Array, " n"], labels: Bool[Array, " n"]) -> float:
    """The midpoint between two neighbouring similarities that separates true from false best (first of equals)."""
    values, group_of = np.unique(s, return_inverse=True)
    if len(values) == 1:
        return float(values[0])
    false_below = np.cumsum(np.bincount(group_of, ~labels))[:-1]
    true_below = np.cumsum(np.bincount(group_of, labels))[:-1]
    cut = int(np.argmax(false_below - true_below))
    return float(values[cut] + (values[cut + 1] - values[cut]) / 2)


def binary_auroc(
    s: Float[Array, " n"], labels: Bool[Array, " n"], weights: Float[Array, "b n"] | None = None, *, tie: Tie = "strict"
) -> Float[Array, " b"]:
    """Area under the ROC curve with the tie policy; nan where one of the two answers is missing."""
    return auroc(s, labels, weights, tie=WORTH[tie])
