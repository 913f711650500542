"""Loss scaling: float16 has no numbers for small gradients, so the loss is made larger and the gradient small again.

Micikevicius et al., arXiv 1710.03740. All scales are powers of two, which change no digit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

FIRST = 2.0**16
PATIENT = 2000
"""Steps taken in a row after which a larger scale is tried."""


@dataclass
class LossScale:
    """Halves where a gradient overflows, doubles when none has for long. The same on every rank."""

    value: float = field(default_factory=lambda: FIRST)
    taken: int = 0
    """Steps since it last changed."""

    def undo(self, gradients: list[Tensor]) -> None:
        """Bring gradients of a scaled loss back to those of the loss itself, in place."""
        torch._foreach_div_(gradients, self.value)  # pyright: ignore

    def fits(self) -> None:
        """A step was taken."""
        self.taken += 1
        if self.taken == PATIENT:
            self.value, self.taken = 2 * self.value, 0

    def overflowed(self) -> None:
        """A step was skipped."""
        self.value, self.taken = max(1.0, self.value / 2), 0
