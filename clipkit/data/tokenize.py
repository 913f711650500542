"""Captions into token ids: open_clip's tokenizers behind one call, cut to the longest text of the call.

Cutting is exact for causal text towers that pool at the end of the text; for others `trim=False` pads to the full
context. Axes: n texts, t tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

CACHED_WORDS = 1 << 16
"""Words whose ids are kept; when there are more, all are forgotten."""


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
        self._words: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Int64[Tensor, "n t"]:
        """Token ids; a text longer than the context is cut and keeps its end mark."""
        rows = [self._encode(text) for text in texts]
        width = max(map(len, rows), default=1) if self.trim else self.context_length
        out = np.zeros((len(rows), width), dtype=np.int64)
        for row, ids in enumerate(rows):
            out[row, : len(ids)] = ids
        return torch.from_numpy(out)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, int, bool]]:
        return Tokenizer, (self.name, self.context_length, self.trim)

    def _encode(self, text: str) -> list[int] | np.ndarray:
        if not self._byte_pairs:
            return self._inner([text], context_length=self.context_length)[0].numpy()
        inner = self._inner
        # open_clip mends encodings, entities and control characters; of plain ASCII that leaves case and blanks.
        plain = self.name == "clip" and text.isascii() and text.isprintable() and "&" not in text
        ids = [inner.sot_token_id]
        for word in (text.lower() if plain else inner.clean_fn(text)).split():
            ids += self._words.get(word) or self._encode_word(word)
        return [*ids[: self.context_length - 1], inner.eot_token_id]

    def _encode_word(self, word: str) -> list[int]:
        """Byte pairs of what stands between blanks: no match of open_clip's pattern reaches over one."""
        inner = self._inner
        if len(self._words) >= CACHED_WORDS:
            self._words.clear()
            # open_clip's own cache has no bound.
            inner.cache = {mark: mark for mark in map(inner.decoder.get, inner.all_special_ids)}
        ids = []
        for part in inner.pat.findall(word):
            symbols = "".join(map(inner.byte_encoder.__getitem__, part.encode()))
            ids += map(inner.encoder.__getitem__, inner.bpe(symbols).split(" "))
        self._words[word] = ids
        return ids
