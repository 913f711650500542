"""How much of what its devices can do a run makes use of: model FLOPs utilisation (arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from clipkit import distributed
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.training.budget import Budget

TEXTS = ("text", "positive_text", "negative_text")


class Work:
    """FLOPs of the model, forward and backward, and what its devices could do.

    Left out is what is computed a second time (`engine.accumulate`, `engine.checkpoint_activations`), which MFU does
    not count, and what `clipkit plan` leaves out. Texts count with the tokens that their batch has. Raises UserError as
    `clipkit plan` does.
    """

    def __init__(self, config: Config, peak_tflops: float):
        self._peak = distributed.world_size() * peak_tflops * 1e12
        once = config.engine.model_copy(update={"accumulate": 1, "checkpoint_activations": False})
        budget = Budget(config.model_copy(update={"engine": once}), 1)
        self._context = budget.context
        self._pairs = budget.pairs_of(1)
        self._flops = {name: forward + backward for name, _, forward, backward in budget.flops}

    def utilisation(self, samples_per_s: float, batch: Batch) -> float:
        """The share of the peak that so many samples a second like those of `batch` take."""
        return samples_per_s * self.flops(batch) / self._peak

    def flops(self, batch: Batch) -> float:
        """Of one sample, its texts as long as those of `batch`."""
        return self._pairs * sum(flops * self._length(name, batch) for name, flops in self._flops.items())

    def _length(self, name: str, batch: Batch) -> float:
        """The tokens of the texts, as a share of the context that `clipkit plan` counts."""
        role = name.removeprefix("teacher: ")
        tokens = getattr(batch, role) if role in TEXTS else None
        return 1.0 if tokens is None or not tokens.shape[-1] else tokens.shape[-1] / self._context
