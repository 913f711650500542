"""Negatives that a model takes for their captions: rewrites that keep the meaning, which word lists cannot see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from clipkit.errors import UserError
from clipkit.negatives.audit.stored import Stored


class Guide(Protocol):
    """What is asked of a model: unit vectors of texts, n d."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...


def alike(stored: Stored, guide: Guide, above: float) -> np.ndarray:
    """Which negatives have a cosine above `above` with their captions, a bool each. Raises UserError for no cosine."""
    if not -1.0 <= above <= 1.0:
        raise UserError(f"--alike {above}: is a cosine, between -1 and 1")
    captions = guide.embed_texts(stored.captions).numpy()
    texts = guide.embed_texts(stored.texts).numpy()
    return np.einsum("nd,nd->n", texts, captions[stored.owner]) > above


def by_kind(stored: Stored, dropped: np.ndarray) -> Counter[str]:
    """How many of the dropped negatives are of each kind."""
    return Counter(stored.kinds[n] for n in np.flatnonzero(dropped))
