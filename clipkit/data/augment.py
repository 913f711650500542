"""Seeded picture augmentation: which crop a picture gets depends on (seed, epoch, id) alone."""

from __future__ import annotations

import math

import numpy as np

from clipkit.data.decode import View
from clipkit.data.seeds import uniform

RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop."""
LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))
TRIES = 10


def random_view(height: int, width: int, size: int, scale: float, *key: int | str) -> View:
    """Random resized crop (Inception's, as CLIP trains with) keeping at least `scale` of the area, drawn by `key`."""
    return View(*crop_box(height, width, scale, uniform(4 * TRIES, *key)), to=(size, size))


def crop_box(height: int, width: int, scale: float, draws: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the first drawn box that fits, else the largest central one of a legal shape.

    `draws`: uniform numbers, four a try: area, shape, top, left.
    """
    for area, shape, y, x in draws.reshape(-1, 4).tolist():
        target = height * width * (scale + area * (1 - scale))
        ratio = math.exp(LOG_RATIO[0] + shape * (LOG_RATIO[1] - LOG_RATIO[0]))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    return (height - h) // 2, (width - w) // 2, h, w
