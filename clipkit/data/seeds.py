"""Random numbers that are a pure function of a key: the same on every machine, rank, worker and library version."""

from __future__ import annotations

import hashlib
import struct

import numpy as np


def bits(n: int, *key: int | str) -> np.ndarray:
    """`n` uniform 64-bit integers (uint64) named by `key`, e.g. (seed, "crop", epoch, id)."""
    stream = hashlib.shake_128(repr(key).encode()).digest(8 * n)
    return np.frombuffer(stream, dtype="<u8")


def uniform(n: int, *key: int | str) -> np.ndarray:
    """`n` uniform numbers (float64) in [0, 1)."""
    return (bits(n, *key) >> np.uint64(11)) * 2.0**-53


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A uniform permutation of 0 ... n-1 (int64)."""
    return np.argsort(bits(n, *key), kind="stable")


def shuffled(n: int, *key: int | str) -> list[int]:
    """`permutation` as a list, in a third of the time for a handful."""
    if n < 2:
        return list(range(n))
    draws = struct.unpack(f"<{n}Q", hashlib.shake_128(repr(key).encode()).digest(8 * n))
    return sorted(range(n), key=draws.__getitem__)
