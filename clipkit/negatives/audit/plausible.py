"""Negatives that a language model finds much less likely than their captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clipkit.errors import UserError
from clipkit.negatives.audit.stored import Stored


class Fluency:
    """A causal language model, asked how surprised it is by a text: nats a token, the mean over its tokens."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 64):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    @staticmethod
    def load(name: str) -> Fluency:
        """A transformers folder or hub name. Raises UserError where there is no such model."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{name}: no causal language model that transformers can load: {reason}") from None
        return Fluency(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)

    @torch.no_grad()
    def surprise(self, texts: Sequence[str]) -> np.ndarray:
        """Nats a token of each text, n; a text's first token is read after the start mark, if the model has one."""
        known: dict[str, float] = dict.fromkeys(texts, 0.0)
        # Of like length side by side: little is padding.
        order = sorted(known, key=len)
        for first in range(0, len(order), self.batch_size):
            some = order[first : first + self.batch_size]
            known.update(zip(some, self._batch(some)))
        return np.array([known[text] for text in texts])

    def _batch(self, texts: Sequence[str]) -> list[float]:
        start = self.tokenizer.bos_token_id
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = [([] if start is None else [start]) + list(row) for row in rows]
        width = max(2, *map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        there = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            there[i, : len(row)] = 1
        device = next(self.model.parameters()).device
        ids, there = ids.to(device), there.to(device)
        logits = self.model(input_ids=ids, attention_mask=there).logits.float()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        counted = there[:, 1:]
        return ((losses * counted).sum(1) / counted.sum(1).clamp(min=1)).tolist()


def implausible(stored: Stored, fluency: Fluency, above: float) -> np.ndarray:
    """Which negatives surprise the model by more than `above` nats a token above their captions, a bool each."""
    captions = fluency.surprise(stored.captions)
    return fluency.surprise(stored.texts) - captions[stored.owner] > above
