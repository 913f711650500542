"""Intervals cover, tests agree with brute force and with published figures."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from clipkit.evaluation.stats import (
    Resampler,
    auroc,
    halves,
    holm,
    mcnemar,
    mean_interval,
    median,
    paired_bootstrap,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998, table I (method 3: score without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_independent_rows_get_wilson():
    values = np.array([1.0, 0.0, 1.0, 1.0])
    rows = Resampler(["a", "b", "c", "d"])
    assert mean_interval(values, [(1.0, np.ones(4, dtype=bool))], rows) == (0.75, *wilson(3, 4))


def test_cluster_bootstrap_has_the_standard_error_of_cluster_means():
    rng = np.random.default_rng(0)
    means = rng.random(300)
    values = np.repeat(means, 5)
    clusters = [str(i // 5) for i in range(1500)]
    value, low, high = mean_interval(values, [(1.0, np.ones(1500, dtype=bool))], Resampler(clusters))
    assert value == pytest.approx(means.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * means.std() / 300**0.5, rel=0.1)


def test_all_right_keeps_an_interval():
    values, clusters = np.ones(40), [str(i // 4) for i in range(40)]
    assert mean_interval(values, [(1.0, np.ones(40, dtype=bool))], Resampler(clusters)) == (1.0, *wilson(10, 10))


def test_macro_counts_pools_alike():
    values = np.array([1.0] * 30 + [0.0, 1.0])
    first = np.arange(32) < 30
    value, low, high = mean_interval(values, [(1.0, first), (1.0, ~first)], Resampler([str(i) for i in range(32)]))
    assert value == 0.75
    assert low <= 0.5 and high == 1.0


def test_resampling_is_seeded():
    draws = [Resampler(["a", "b", "b"], seed=s).weights for s in (0, 0, 1)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()
    assert (draws[0].sum(1) == 2).all()


def test_auroc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(1)
    s, labels = rng.integers(0, 9, 50).astype(float), rng.random(50) < 0.4
    pairs = list(itertools.product(s[labels], s[~labels]))
    for tie in (0.0, 0.5, 1.0):
        expected = np.mean([1.0 if a > b else tie if a == b else 0.0 for a, b in pairs])
        assert auroc(s, labels, tie=tie)[0] == pytest.approx(expected)
    weights = rng.integers(0, 3, (4, 50)).astype(np.float32)
    for line, value in zip(weights, auroc(s, labels, weights)):
        repeated, truth = np.repeat(s, line.astype(int)), np.repeat(labels, line.astype(int))
        assert value == pytest.approx(auroc(repeated, truth)[0])


def test_weighted_median():
    values = np.array([5.0, 1.0, 3.0])
    assert median(values, np.array([[1, 1, 1], [4, 1, 1], [0, 1, 0]])).tolist() == [3.0, 5.0, 1.0]


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (9, 2), (969, 360), (30, 31)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    first, second = [1] * b + [0] * c + [1, 0], [0] * b + [1] * c + [1, 0]
    result = mcnemar(first, second)
    assert (result.only_first, result.only_second) == (b, c)
    tail = sum(Fraction(comb(b + c, k), 2 ** (b + c)) for k in range(min(b, c) + 1))
    assert result.p == pytest.approx(float(min(1, 2 * tail)), rel=1e-9)


def test_paired_bootstrap():
    rng = np.random.default_rng(2)
    first = (rng.random(500) < 0.5).astype(float)
    second = np.where(rng.random(500) < 0.2, 1.0, first)
    clusters = [str(i) for i in range(500)]
    gap = paired_bootstrap(first, second, clusters)
    assert gap.value == pytest.approx(second.mean() - first.mean())
    assert 0 < gap.low < gap.value < gap.high and gap.p < 0.01
    assert paired_bootstrap(first, first, clusters).p == 1.0


def test_holm():
    # Holm's own steps: 0.01 x 3, 0.02 x 2, 0.04 x 1, never smaller than the one before.
    assert holm({"b": 0.02, "a": 0.01, "c": 0.04}) == pytest.approx({"b": 0.04, "a": 0.03, "c": 0.04})
    assert holm({"a": 0.5, "b": 0.6}) == {"a": 1.0, "b": 1.0}


def test_halves_keep_clusters_together():
    clusters = [str(i // 3) for i in range(60)]
    side = halves(clusters)
    assert set(side.tolist()) == {0, 1}
    assert all(len(set(side[i : i + 3].tolist())) == 1 for i in range(0, 60, 3))
