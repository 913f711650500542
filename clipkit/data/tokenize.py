"""Captions into token ids: open_clip's tokenizers behind one call, cut to the longest text of the call.

Cutting is exact for causal text towers that pool at the end of the text; for others `trim=False` pads to the full
context. Axes: n texts, t tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

CACHED_CAPTIONS = 1 << 16
CACHED_WORDS = 1 << 17


class Tokenizer:
    """`name`: "clip" for CLIP's byte pairs, else what `open_clip.get_tokenizer` takes. Picklable; padding is 0."""

    def __init__(self, name: str = "clip", context_length: int = 77, trim: bool = True):
        import open_clip  # five seconds: only when texts are really read

        self.name, self.context_length, self.trim = name, context_length, trim
        self._inner: Any = (
            open_clip.SimpleTokenizer() if name == "clip" else open_clip.get_tokenizer(name, context_length)
        )
        # A reduction (CLIPA's syntax masks) and other tokenizers are called whole and keep their own padding.
        self._byte_pairs = isinstance(self._inner, open_clip.SimpleTokenizer) and self._inner.reduction_fn is None
        self._ids = lru_cache(CACHED_CAPTIONS)(self._encode)

    def __call__(self, texts: list[str]) -> Int64[Tensor, "n t"]:
        """Token ids; a text longer than the context is cut and keeps its end mark."""
        rows = [self._ids(text) for text in texts]
        width = max(map(len, rows), default=1) if self.trim else self.context_length
        out = np.zeros((len(rows), width), dtype=np.int64)
        for row, ids in zip(out, rows):
            row[: len(ids)] = ids
        return torch.from_numpy(out)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, int, bool]]:
        return Tokenizer, (self.name, self.context_length, self.trim)

    def _encode(self, text: str) -> np.ndarray:
        if not self._byte_pairs:
            return self._inner([text], context_length=self.context_length)[0].numpy()
        inner = self._inner
        body = inner.encode(text)[: self.context_length - 2]
        if len(inner.cache) > CACHED_WORDS:  # open_clip's own cache of words has no bound
            inner.cache = {mark: mark for mark in map(inner.decoder.get, inner.all_special_ids)}
        return np.array([inner.sot_token_id, *body, inner.eot_token_id])
