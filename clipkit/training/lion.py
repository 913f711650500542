"""Lion: every weight moves by the learning rate, whichever way its momentum points. Chen et al., arXiv 2302.06675."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of the paper, over lists of tensors at once:

        u = sign(β1 m + (1 - β1) g)      w ← w - lr (u + λ w)      m ← β2 m + (1 - β2) g

    λ is decoupled weight decay. One moment a parameter (`exp_avg`), no count of steps. Where momentum and gradient are
    both 0 a weight does not move but for its decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None, "the gradient is there before the step"
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for parameter in moved:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            if moved:
                self._move(moved, [self.state[p]["exp_avg"] for p in moved], group)

    def _move(self, weights: list[Tensor], moments: list[Tensor], group: dict[str, Any]) -> None:
        (toward, keep), rate = group["betas"], group["lr"]
        lists: Any = torch  # whose functions of lists are named as its own affair, and used by all its optimizers
        slopes = [w.grad for w in weights if w.grad is not None]
        update = lists._foreach_lerp(moments, slopes, 1 - toward)
        lists._foreach_sign_(update)
        lists._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        lists._foreach_add_(weights, update, alpha=-rate)
        lists._foreach_lerp_(moments, slopes, 1 - keep)
