"""Antialiased resize of uint8 pictures, as Pillow's: by torch's kernel, or by Pillow where that kernel is slow.

Torch's weights are 16 bits wide, Pillow's 32: of photographs 0.3 % of the values are one level off, one in two million
two levels, none more (docs/log.md). Axes: h w pixels before, H W after.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

Kernel = Callable[[UInt8[Tensor, "3 h w"], int, int, str], UInt8[Tensor, "3 H W"]]


def resize(pixels: UInt8[Tensor, "3 h w"], height: int, width: int, interpolation: str) -> UInt8[Tensor, "3 H W"]:
    """Antialiased resize ("bicubic" or "bilinear"), by the kernel that is fast on this CPU."""
    if pixels.shape[1:] == (height, width):
        return pixels
    return KERNEL(pixels, height, width, interpolation)


def by_torch(pixels: UInt8[Tensor, "3 h w"], height: int, width: int, interpolation: str) -> UInt8[Tensor, "3 H W"]:
    """Torch's kernel on a channels-last view: with AVX2 several times as fast as Pillow."""
    rows, columns = pixels.shape[1:]
    if rows - height > max(0, 2 * (columns - width)):  # where Pillow, since 13, begins with the vertical pass
        pixels = functional.interpolate(pixels[None], (height, columns), mode=interpolation, antialias=True)[0]
    return functional.interpolate(pixels[None], (height, width), mode=interpolation, antialias=True)[0]


def by_pillow(pixels: UInt8[Tensor, "3 h w"], height: int, width: int, interpolation: str) -> UInt8[Tensor, "3 H W"]:
    """Pillow's resize, which is the reference."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return channels_first(np.array(picture.resize((width, height), Image.Resampling[interpolation.upper()])))


def channels_first(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 h w"]:
    """The array as a tensor: a channels-last view, which torch's kernel is fastest on."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def kernel_for(capability: str) -> Kernel:
    """The faster kernel on a CPU of that capability (as `torch.backends.cpu.get_cpu_capability` calls it)."""
    return by_torch if capability in ("AVX2", "AVX512") else by_pillow


KERNEL = kernel_for(torch.backends.cpu.get_cpu_capability())
