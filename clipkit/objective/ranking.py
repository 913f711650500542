"""Order instead of odds: a caption must lie nearer than its negatives by a margin."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import similarity
from clipkit.registry import term


@term(name="rank", needs="negative_text")
class Rank:
    """Hinge of each image between its caption and its negatives, with margins that follow. CE-CLIP, arXiv 2306.08832.

        mean_{ik valid} relu( m_k + s v_i·n_ik - s v_i·t_i )
        m_k ← clamp( mean_i s v_i·t_i - mean_{i: ik valid} s v_i·n_ik, least, most )      for the next step, no gradient

    One margin for each place k of the negatives, at first 0 (or `least`); where no negative stands in a place, its
    margin stays. `least` equal to `most` is a fixed margin. The released code divides by n·k, valid or not, and starts
    from 0 again each epoch.
    """

    def __init__(self, *, least: float = 0.0, most: float = 10.0):
        if least > most:
            raise UserError(f"rank: least ({least}) is above most ({most})")
        self.least, self.most = least, most
        self.margin: Float[Tensor, " k"] | None = None
        self._before: Float[Tensor, " k"] | None = None

    def __call__(self, z: Embeddings) -> Float[Tensor, ""]:
        negatives, valid = z.negatives
        self._before = self.margin
        own = z.scale * similarity(z.image[:, None], z.text[:, None])[:, 0]  # n 1
        other = z.scale * similarity(z.image[:, None], negatives)[:, 0]
        if self.margin is None:
            self.margin = other.new_zeros(other.shape[1]).clamp(self.least, self.most)
        if len(self.margin) != other.shape[1]:
            raise UserError(
                f"rank: keeps margins for {len(self.margin)} negatives a pair, got {other.shape[1]}; "
                "leave data.negatives as it was, or start a new run with model.start"
            )
        losses = (self.margin.to(other) + other - own).relu().masked_fill(~valid, 0.0)
        self._follow(own.detach(), other.detach(), valid)
        return losses.sum() / valid.sum().clamp(min=1)

    def _follow(self, own: Float[Tensor, "n 1"], other: Float[Tensor, "n k"], valid: Bool[Tensor, "n k"]) -> None:
        assert self.margin is not None
        count = valid.sum(0)
        gap = own.mean() - other.masked_fill(~valid, 0.0).sum(0) / count.clamp(min=1)
        self.margin = torch.where(count > 0, gap.clamp(self.least, self.most), self.margin.to(other))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {} if self.margin is None else {"margin": self.margin}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.margin = state.get("margin")

    def undo(self) -> None:
        """Forget the last batch."""
        self.margin = self._before
