"""What probabilities and embeddings are like, beside what they get right.

Axes: n rows, b bins, d embedding (unit length).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

Array = np.ndarray
MOST = 2048
"""Rows whose pairs `uniformity` looks at; of more, a seeded choice."""


def calibration(sure: Float[Array, " n"], right: Float[Array, " n"], bins: int = 15) -> dict[str, Any]:
    """Expected calibration error of the probability of the class chosen (Guo et al., arXiv 1706.04599, equation 3).

    {"ece", "bins": [{"from", "sure", "right", "n"}, those with rows]}; bins are of equal width.
    """
    at = np.minimum((sure * bins).astype(int), bins - 1)
    found = [
        {
            "from": number / bins,
            "sure": float(sure[at == number].mean()),
            "right": float(right[at == number].mean()),
            "n": int((at == number).sum()),
        }
        for number in np.unique(at)
    ]
    return {"ece": sum(one["n"] * abs(one["sure"] - one["right"]) for one in found) / len(sure), "bins": found}


def alignment(x: Float[Array, "n d"], y: Float[Array, "n d"]) -> float:
    """Mean squared distance of pairs, 0 to 4 (Wang & Isola, arXiv 2005.10242, with alpha 2)."""
    return float(np.square(x - y).sum(1).mean())


def uniformity(x: Float[Array, "n d"], t: float = 2.0) -> float:
    """Log of the mean of exp(-t · squared distance) over pairs of different rows; the lower, the more even (ibid.)."""
    if len(x) > MOST:
        x = x[np.random.default_rng(0).choice(len(x), MOST, replace=False)]
    if len(x) < 2:
        return 0.0
    near = np.exp(2 * t * (x.astype(np.float64) @ x.T.astype(np.float64) - 1))
    return float(np.log((near.sum() - np.trace(near)) / (len(x) * (len(x) - 1))))


def modality_gap(images: Float[Array, "n d"], texts: Float[Array, "m d"]) -> float:
    """Distance of the mean picture and the mean text (Liang et al., arXiv 2203.02053)."""
    return float(np.linalg.norm(images.mean(0, dtype=np.float64) - texts.mean(0, dtype=np.float64)))
