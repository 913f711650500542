"""Scores against the official scripts' own definitions, tie rules, chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from clipkit.evaluation.scores import SCORES, best_threshold, binary, binary_auroc, chance, main_score, pattern
from tests.evaluation.fakes import FORMS

PAIR, WINOGROUND, TWO_RIGHT = ((1, 0),), ((1, 0), (0, 1)), ((1, 1, 0),)


def winoground_text(s: np.ndarray) -> bool:  # github Winoground: c0_i0 > c1_i0 and c1_i1 > c0_i1
    return bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])


def winoground_image(s: np.ndarray) -> bool:  # c0_i0 > c0_i1 and c1_i1 > c1_i0
    return bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])


OFFICIAL: list[tuple[str, tuple[tuple[int, ...], ...], Callable[[np.ndarray], bool]]] = [
    ("i2t", PAIR, lambda s: s[0, 0] > s[0, 1]),  # SugarCrepe main_eval.py: pos > neg
    ("i2t", ((1, 0, 0, 0, 0),), lambda s: s[0, 0] > s[0, 1:].max()),
    ("i2t", WINOGROUND, winoground_text),
    ("t2i", WINOGROUND, winoground_image),
    ("group", WINOGROUND, lambda s: winoground_text(s) and winoground_image(s)),
    ("t2i", ((1,), (0,)), lambda s: s[0, 0] > s[1, 0]),
    ("i2t_all", TWO_RIGHT, lambda s: s[0, 0] > s[0, 2] and s[0, 1] > s[0, 2]),  # SugarCrepe++ ITT
    ("i2t", TWO_RIGHT, lambda s: max(s[0, 0], s[0, 1]) > s[0, 2]),
]


@pytest.mark.parametrize(("name", "match", "official"), OFFICIAL)
def test_decides_as_the_official_script(name, match, official):
    # A coarse grid, so that ties occur: all of these scripts count them as wrong.
    s = np.random.default_rng(0).integers(0, 4, (300, len(match), len(match[0]))).astype(np.float32)
    decision = SCORES[name](s, match, tie="strict")
    assert decision.credit.tolist() == [float(official(row)) for row in s]
    assert decision.tied.any()


@pytest.mark.parametrize(("tie", "pair", "five"), [("strict", 0.0, 0.0), ("lenient", 1.0, 1.0), ("half", 0.5, 0.2)])
def test_tie_rules(tie, pair, five):
    for match, expected in ((PAIR, pair), (((0, 0, 1, 0, 0),), five)):
        decision = SCORES["i2t"](np.ones((3, 1, len(match[0]))), match, tie=tie)
        assert decision.credit.tolist() == [expected] * 3
        assert decision.tied.all()


def test_lenient_is_argmax_with_the_right_text_first():
    # ARO's Order sets and What'sUp: argmax, the right text at index 0.
    s = np.random.default_rng(1).integers(0, 3, (200, 1, 4)).astype(np.float32)
    assert SCORES["i2t"](s, ((1, 0, 0, 0),), tie="lenient").credit.tolist() == (s[:, 0].argmax(1) == 0).tolist()


def test_forms_have_their_score():
    expected = {"pair": "i2t", "pictures": "t2i", "winoground": "group", "three": "group", "true": "binary"}
    assert {form: main_score(pattern(FORMS[form])) for form in expected} == expected
    assert SCORES["i2t"](np.zeros((1, 2, 1)), ((1,), (0,))) is None
    assert SCORES["i2t_all"](np.zeros((1, 1, 2)), PAIR) is None


@pytest.mark.parametrize("match", [PAIR, WINOGROUND, TWO_RIGHT, ((1,), (0,), (0,)), ((1, 0, None),), ((1, 0, 0),) * 2])
def test_chance_is_what_random_similarities_give(match):
    s = np.random.default_rng(2).random((40_000, len(match), len(match[0])))
    for name in SCORES:
        decision = SCORES[name](s, match)
        if decision is None:
            assert np.isnan(chance(match, name))
        else:
            assert chance(match, name) == pytest.approx(decision.credit.mean(), abs=0.01)


def test_binary_threshold_comes_from_the_other_half():
    rng = np.random.default_rng(3)
    clusters = [str(i) for i in range(400)]
    labels = rng.random(400) < 0.5
    noise = rng.random(400)
    fitted_on_itself = ((noise > best_threshold(noise, labels)) == labels).mean()
    assert fitted_on_itself > 0.5
    assert abs(binary(noise, labels, clusters).credit.mean() - 0.5) < 0.08
    assert binary(labels + noise / 10, labels, clusters).credit.all()


@pytest.mark.parametrize(("tie", "expected"), [("strict", 0.0), ("half", 0.5), ("lenient", 1.0)])
def test_binary_ties(tie, expected):
    labels = np.arange(20) % 2 == 0
    same = np.ones(20, dtype=np.float32)
    assert binary(same, labels, [str(i) for i in range(20)], tie=tie).credit.tolist() == [expected] * 20
    assert binary_auroc(same, labels, tie=tie)[0] == expected


def test_best_threshold_is_the_best():
    rng = np.random.default_rng(4)
    s, labels = rng.integers(0, 20, 60).astype(np.float32), rng.random(60) < 0.5
    cuts = np.unique(s)[:-1] + 0.5
    best = max(((s > cut) == labels).mean() for cut in cuts)
    assert ((s > best_threshold(s, labels)) == labels).mean() == best
