"""The resize: both kernels against Pillow, and which of them a CPU gets."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from clipkit.data.resize import Kernel, by_pillow, by_torch, channels_first, kernel_for

from .conftest import noise_picture

SHAPES = [(300, 200, 64, 64), (200, 150, 224, 224), (90, 70, 70, 70), (333, 65, 64, 328), (64, 64, 100, 40)]
TALL = [(200, 301, 150, 100), (228, 404, 224, 224), (64, 320, 64, 100)]
"""Where Pillow begins with the vertical pass, since 13."""


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("kernel", [by_torch, by_pillow])
@pytest.mark.parametrize(("width", "height", "to_width", "to_height"), SHAPES + TALL)
def test_both_kernels_are_pillows_resize(
    kernel: Kernel, interpolation: str, width: int, height: int, to_width: int, to_height: int
) -> None:
    """Grain on a smooth picture, so that values also overshoot between the passes."""
    if (width, height, to_width, to_height) in TALL and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("older Pillow always begins with the horizontal pass")
    grain = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    pixels = np.clip(np.asarray(noise_picture(0, width, height)) + grain, 0, 255).astype(np.uint8)
    expected = Image.fromarray(pixels).resize((to_width, to_height), Image.Resampling[interpolation.upper()])
    found = kernel(channels_first(pixels), to_height, to_width, interpolation)
    off = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int))
    assert found.dtype == torch.uint8 and found.shape == (3, to_height, to_width)
    assert off.max() <= (1 if kernel is by_torch else 0) and off.mean() < 0.03


def test_torchs_kernel_only_where_it_is_fast() -> None:
    assert all(kernel_for(capability) is by_torch for capability in ("AVX2", "AVX512"))
    assert all(kernel_for(capability) is by_pillow for capability in ("DEFAULT", "NO AVX", "VSX", "Z VECTOR", "SVE256"))


def test_chosen_at_start() -> None:
    """A process that is told to do without vectors is one on a CPU without them."""
    code = "from clipkit.data import resize; print(resize.KERNEL.__name__)"
    plain = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "by_pillow"
