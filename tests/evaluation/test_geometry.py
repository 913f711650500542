"""Calibration, alignment, uniformity and the modality gap against their naive loops, and where results hold them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from clipkit.evaluation.geometry import MOST, alignment, calibration, modality_gap, uniformity


def unit(n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_calibration_is_its_definition():
    rng = np.random.default_rng(0)
    sure = np.append(rng.random(200), 1.0)
    right = (rng.random(201) < sure).astype(float)
    expected = 0.0
    for b in range(10):
        inside = [i for i in range(201) if b / 10 <= sure[i] < (b + 1) / 10 or (b == 9 and sure[i] == 1)]
        if inside:
            gap = sum(sure[i] for i in inside) / len(inside) - sum(right[i] for i in inside) / len(inside)
            expected += len(inside) / 201 * abs(gap)
    found = calibration(sure, right, bins=10)
    assert found["ece"] == pytest.approx(expected)
    assert sum(one["n"] for one in found["bins"]) == 201
    assert calibration(np.ones(4), np.ones(4))["ece"] == 0.0
    assert calibration(np.ones(4), np.zeros(4))["ece"] == 1.0


def test_distances_are_their_definitions():
    x, y = unit(7), unit(7, seed=1)
    assert alignment(x, y) == pytest.approx(np.mean([((a - b) ** 2).sum() for a, b in zip(x, y)]), rel=1e-5)
    pairs = [math.exp(-2 * ((x[i] - x[j]) ** 2).sum()) for i in range(7) for j in range(7) if i != j]
    assert uniformity(x) == pytest.approx(math.log(np.mean(pairs)), rel=1e-5)
    assert modality_gap(x, y) == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), rel=1e-5)
    same = np.repeat(x[:1], 5, axis=0)
    assert alignment(same, same) == 0.0 and modality_gap(same, same) == 0.0
    assert uniformity(same) == pytest.approx(0.0, abs=1e-6)


def test_uniformity_of_many_rows_is_that_of_a_seeded_choice():
    x = unit(MOST + 500)
    assert uniformity(x) == uniformity(x) == pytest.approx(uniformity(x[:MOST]), abs=0.02)
