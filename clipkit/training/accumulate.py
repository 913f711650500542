"""Cached accumulation (GradCache, arXiv 2101.06983): a batch encoded in parts, with the gradient of the whole.

Adding up the gradients of parts is not the gradient of a contrastive batch: each part would see only its own negatives.
So every part is encoded twice: first without gradient, for the loss over all embeddings and its gradient at them; then
with gradient, for the inner product of embeddings and that gradient, whose own gradient is the one wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from clipkit.data.batch import Batch
from clipkit.model.embeddings import Embeddings

Generators = tuple[Tensor, list[Tensor]]


class EmbeddingCache:
    """The embeddings of a batch as leaves of the graph, and the way from their gradient back into the model."""

    def __init__(self, model: Callable[[Batch], Embeddings], parts: list[Batch]):
        self._model, self._parts = model, parts
        self._begin = _generators()
        with torch.no_grad():
            joined = Embeddings.join([self._encode(part) for part in parts])
        self.embeddings = replace(joined, **{name: x.detach().requires_grad_() for name, x in joined.leaves().items()})

    def surrogate(self, number: int) -> Tensor:
        """A scalar of part `number` whose gradient is its share of the loss's; the loss was taken backward before."""
        now = _generators()
        z = self._encode(self._parts[number])
        _set_generators(now)  # as if it had been encoded once
        rows = slice(number * len(z), (number + 1) * len(z))
        total = torch.zeros((), device=z.image.device)
        for name, leaf in self.embeddings.leaves().items():
            if leaf.grad is not None:
                # Scale and bias are the same in every part.
                grad = leaf.grad / len(self._parts) if name in ("scale", "bias") else leaf.grad[rows]
                total = total + (getattr(z, name) * grad).sum()
        return total

    def _encode(self, part: Batch) -> Embeddings:
        # Every part draws what the whole batch would have drawn, both times: dropout masks are keyed by one number
        # from the generator and by the samples' own ids.
        _set_generators(self._begin)
        return self._model(part)


def _generators() -> Generators:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_generators(state: Generators) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
