"""A sorting network whose swaps are soft, so that what comes out on top has a slope. Axes: a rows, r values to sort.

Petersen et al., arXiv 2105.04019 and 2203.09630: an odd-even network compares neighbours, as many layers as there are
values; each comparator swaps with a probability that the difference of its two values gives.
"""

from __future__ import annotations

from math import pi

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor


def upper_share(
    values: Float[Tensor, "a r"], there: Bool[Tensor, "a r"], count: int, steepness: float
) -> Float[Tensor, "a r"]:
    """The probability of each value to come out among the `count` highest, with Cauchy's distribution function.

    Values that are not `there` come first in their row, lower than all others for sure.
    """
    layers = range(values.shape[1])
    stays = []
    for layer in layers:
        low, high = _neighbours(values, layer)
        soft = (steepness * (high - low)).atan() / pi + 0.5
        stays.append(torch.where(_neighbours(there, layer)[0], soft, 1.0))
        values = _swapped(values, layer, stays[layer])
    # The network is a product of doubly stochastic matrices: applied to an indicator of the ranks, from its end on.
    share = (torch.arange(len(layers), device=values.device) >= len(layers) - count).to(values.dtype).expand_as(values)
    for layer in reversed(layers):
        share = _swapped(share, layer, stays[layer])
    return share


def _neighbours(x: Shaped[Tensor, "a r"], layer: int) -> tuple[Shaped[Tensor, "a s"], Shaped[Tensor, "a s"]]:
    first, count = layer % 2, (x.shape[1] - layer % 2) // 2
    low, high = x[:, first : first + 2 * count].unflatten(1, (count, 2)).unbind(2)
    return low, high


def _swapped(x: Float[Tensor, "a r"], layer: int, stay: Float[Tensor, "a s"]) -> Float[Tensor, "a r"]:
    low, high = _neighbours(x, layer)
    mixed = torch.stack([stay * low + (1 - stay) * high, (1 - stay) * low + stay * high], 2).flatten(1)
    first = layer % 2
    return torch.cat([x[:, :first], mixed, x[:, first + mixed.shape[1] :]], 1)
