"""Random numbers by name: fixed for good, and the quick form equals the plain one."""

from __future__ import annotations

import numpy as np

from clipkit.data.seeds import bits, permutation, shuffled, uniform


def test_they_never_change() -> None:
    assert permutation(8, 1, "x").tolist() == [6, 3, 2, 7, 1, 5, 4, 0]
    assert int(bits(1, 0, "a")[0]) == 12424372430588252398
    assert np.round(uniform(2, 5, "b", 3), 6).tolist() == [0.096228, 0.752524]


def test_shuffled_is_the_permutation() -> None:
    for n in range(40):
        assert shuffled(n, 3, "texts", n) == permutation(n, 3, "texts", n).tolist()


def test_names_matter() -> None:
    assert permutation(50, 1).tolist() != permutation(50, 2).tolist()
    assert permutation(50, 1, "a").tolist() != permutation(50, 1, "b").tolist()
