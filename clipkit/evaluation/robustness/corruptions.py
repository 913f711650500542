"""The fifteen common corruptions of ImageNet-C (Hendrycks & Dietterich, arXiv 1903.12261) at severities 1 to 5.

Kinds and their numbers are ImageNet-C's, made for pictures of 224 pixels; every picture is therefore brought to
224 × 224 first (shorter side, centre). Three differ in how they are drawn: frost is a generated pattern, not a
photograph of frost; glass blur moves all pixels of a round at once, not one after the other; elastic transform smooths
its field by Fourier transform. What is random is seeded by picture, kind and severity: every model sees the same
pixels. Axes: h w pixels, values 0…1.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad
from torchvision.transforms.functional import gaussian_blur

from clipkit.errors import UserError, did_you_mean

Array = np.ndarray
Pixels = Float[Array, "h w 3"]
Random = np.random.Generator
SIDE = 224
FRAMED = "framed"
"""The change that only brings a picture to SIDE × SIDE: what the others are compared with."""
FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}


def changed(image: Image.Image, change: str, name: str) -> Image.Image:
    """The RGB picture called `name`, framed and, for `KIND:SEVERITY`, corrupted. Raises UserError for other changes."""
    image = _framed(image)
    if change == FRAMED:
        return image
    kind, _, severity = change.partition(":")
    check(kind, int(severity) if severity.isdigit() else 0)
    seed = hashlib.sha256(f"{change}/{name}".encode()).digest()
    x = CORRUPTIONS[kind](np.asarray(image, dtype=np.float64) / 255, int(severity), np.random.default_rng([*seed]))
    return Image.fromarray((x.clip(0, 1) * 255).astype(np.uint8))


def check(kind: str, severity: int) -> None:
    """Raises UserError where there is no such kind, or severity."""
    if kind not in CORRUPTIONS:
        raise UserError(f"no corruption called {kind}{did_you_mean(kind, CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise UserError(f"corruption {kind}: severity should be 1 to 5, got {severity}")


def _framed(image: Image.Image) -> Image.Image:
    shorter = min(image.size)
    size = [max(SIDE, round(side * SIDE / shorter)) for side in image.size]
    image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return image.crop((left, top, left + SIDE, top + SIDE))


def gaussian_noise(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Normal noise on every value."""
    return x + rng.normal(0, _of((0.08, 0.12, 0.18, 0.26, 0.38), severity), x.shape)


def shot_noise(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Poisson noise, as of few photons."""
    photons = _of((60, 25, 12, 5, 3), severity)
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Salt and pepper."""
    struck = rng.random(x.shape) < _of((0.03, 0.06, 0.09, 0.17, 0.27), severity)
    return np.where(struck, rng.integers(0, 2, x.shape), x)


def defocus_blur(x: Pixels, severity: int, rng: Random) -> Pixels:
    """A disc instead of each point."""
    radius, soft = _of(((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)), severity)
    reach = max(8, radius)
    across = np.arange(-reach, reach + 1)
    disc = (across[:, None] ** 2 + across**2 <= radius**2).astype(np.float64)
    return _convolved(x, _smoothed(disc[..., None] / disc.sum(), soft, 3 if radius <= 8 else 5)[..., 0])


def glass_blur(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Pixels exchanged with near ones, between two slight blurs."""
    sigma, reach, rounds = _of(((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)), severity)
    x = _smoothed(x, sigma)
    down, across = np.indices(x.shape[:2])
    for _ in range(rounds):
        dy, dx = rng.integers(-reach, reach, (2, *down.shape))
        x = x[(down + dy).clip(0, len(x) - 1), (across + dx).clip(0, x.shape[1] - 1)]
    return _smoothed(x, sigma)


def motion_blur(x: Pixels, severity: int, rng: Random) -> Pixels:
    """A trace instead of each point."""
    radius, sigma = _of(((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), severity)
    return _convolved(x, _trace(radius, sigma, rng.uniform(-45, 45)))


def zoom_blur(x: Pixels, severity: int, rng: Random) -> Pixels:
    """The mean of the picture and enlargements of it."""
    end, step = _of(((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)), severity)
    zoomed = [_zoomed(x, factor) for factor in np.arange(1, end, step)]
    return (x + sum(zoomed)) / (len(zoomed) + 1)


def snow(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Flakes drawn out by the wind, on a whitened picture."""
    mean, spread, size, least, radius, sigma, kept = _of(
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        severity,
    )
    flakes = _zoomed(rng.normal(mean, spread, (*x.shape[:2], 1)), size)
    flakes = np.where(flakes < least, 0, flakes.clip(0, 1))
    flakes = _convolved(flakes, _trace(radius, sigma, rng.uniform(-135, -45)))
    white = kept * x + (1 - kept) * np.maximum(x, 1.5 * _grey(x) + 0.5)
    return white + flakes + np.rot90(flakes, 2)


def frost(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Ice on a window: bright ridges where two clouds meet."""
    kept, ice = _of(((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), severity)
    ridges = 1 - np.abs(_clouds(rng, 1.7) - _clouds(rng, 1.7)) * 2
    pattern = ridges.clip(0, 1)[: len(x), : x.shape[1], None] ** 2
    return kept * x + ice * pattern * np.array([0.85, 0.93, 1.0])


def fog(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Clouds before the picture."""
    thick, decay = _of(((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)), severity)
    brightest = x.max()
    return (x + thick * _clouds(rng, decay)[: len(x), : x.shape[1], None]) * brightest / (brightest + thick)


def brightness(x: Pixels, severity: int, rng: Random) -> Pixels:
    """A higher value in HSV; hue and saturation stay."""
    value = x.max(2, keepdims=True)
    brighter = (value + _of((0.1, 0.2, 0.3, 0.4, 0.5), severity)).clip(0, 1)
    return np.where(value > 0, x / np.maximum(value, 1e-9) * brighter, brighter)


def contrast(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Nearer to the picture's mean colour."""
    mean = x.mean((0, 1), keepdims=True)
    return mean + (x - mean) * _of((0.4, 0.3, 0.2, 0.1, 0.05), severity)


def elastic_transform(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Three corners moved, then a smooth random field; lengths are shares of 244 pixels, as published."""
    size = 244
    strength, sigma, corner = _of(
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)), severity
    )
    height, width = x.shape[:2]
    third = min(height, width) // 3
    centre = np.array([width, height]) // 2
    before = np.array([centre + third, centre + np.array([third, -third]), centre - third], dtype=float)
    after = before + rng.uniform(-corner * size, corner * size, (3, 2))
    # Each pixel of the result is fetched from where the inverse map says.
    back = np.linalg.solve(np.c_[after, np.ones(3)], before).T
    field = rng.uniform(-1, 1, (2, height, width))
    moved = np.stack([_waves(one, sigma * size) for one in field]) * strength * size
    down, across = np.indices((height, width), dtype=np.float64)
    from_x, from_y = np.einsum("ij,jhw->ihw", back, np.stack([across + moved[0], down + moved[1], np.ones_like(down)]))
    return _fetched(x, from_x, from_y)


def pixelate(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Large pixels."""
    share = _of((0.6, 0.5, 0.4, 0.3, 0.25), severity)
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    small = image.resize((int(image.width * share), int(image.height * share)), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def jpeg_compression(x: Pixels, severity: int, rng: Random) -> Pixels:
    """Saved as a small JPEG."""
    out = io.BytesIO()
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    image.save(out, "JPEG", quality=_of((25, 18, 15, 10, 7), severity))
    return np.asarray(Image.open(out).convert("RGB")) / 255


CORRUPTIONS: dict[str, Callable[[Pixels, int, Random], Pixels]] = {
    f.__name__: f
    for f in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip


def _of(values: Sequence[Any], severity: int) -> Any:
    return values[severity - 1]


def _grey(x: Pixels) -> Float[Array, "h w 1"]:
    return x @ np.array([[0.299], [0.587], [0.114]])


def _planes(x: Float[Array, "h w c"]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1), dtype=np.float32))


def _smoothed(x: Float[Array, "h w c"], sigma: float, size: int = 0) -> Float[Array, "h w c"]:
    """Gaussian blur; `size` of the kernel, else four deviations on each side."""
    size = size or 2 * math.ceil(4 * sigma) + 1
    return gaussian_blur(_planes(x), [size, size], [sigma, sigma]).numpy().transpose(1, 2, 0)


def _convolved(x: Float[Array, "h w c"], kernel: Float[Array, "k k"]) -> Float[Array, "h w c"]:
    reach, weights = len(kernel) // 2, torch.from_numpy(kernel).float()[None, None]
    around = pad(_planes(x)[:, None], [reach] * 4, mode="reflect")
    return conv2d(around, weights)[:, 0].numpy().transpose(1, 2, 0)


def _trace(radius: int, sigma: float, angle: float) -> Float[Array, "k k"]:
    """A line that starts in the middle and fades, in degrees."""
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    for step in range(radius + 1):
        x, y = step * math.cos(math.radians(angle)), step * math.sin(math.radians(angle))
        kernel[round(radius + y), round(radius + x)] += math.exp(-(step**2) / (2 * sigma**2))
    return kernel / kernel.sum()


def _zoomed(x: Float[Array, "h w c"], factor: float) -> Float[Array, "h w c"]:
    """The middle, enlarged to the same size."""
    theta = torch.tensor([[[1 / factor, 0, 0], [0, 1 / factor, 0]]], dtype=torch.float32)
    planes = _planes(x)[None]
    grid = affine_grid(theta, list(planes.shape), align_corners=True)
    return grid_sample(planes, grid, padding_mode="border", align_corners=True)[0].numpy().transpose(1, 2, 0)


def _fetched(x: Pixels, from_x: Float[Array, "h w"], from_y: Float[Array, "h w"]) -> Pixels:
    """The pixels at these places, mirrored beyond the edges."""
    height, width = x.shape[:2]
    grid = np.stack([2 * from_x / (width - 1) - 1, 2 * from_y / (height - 1) - 1], axis=-1)
    found = grid_sample(
        _planes(x)[None], torch.from_numpy(grid).float()[None], padding_mode="reflection", align_corners=True
    )
    return found[0].numpy().transpose(1, 2, 0)


def _waves(field: Float[Array, "h w"], sigma: float) -> Float[Array, "h w"]:
    """The field under a Gaussian, by its transform (edges meet)."""
    down, across = (np.fft.fftfreq(side)[:, None] ** 2 for side in field.shape)
    kept = np.exp(-2 * (math.pi * sigma) ** 2 * (down + across.T))
    return np.fft.ifft2(np.fft.fft2(field) * kept).real


def _clouds(rng: Random, decay: float, size: int = 256) -> Float[Array, "s s"]:
    """A plasma fractal by the diamond-square rule, 0…1; each round's noise is `decay` times smaller."""
    out, step, noise = np.zeros((size, size)), size, 1.0
    while step >= 2:
        half = step // 2
        corners = out[::step, ::step]
        rows = corners + np.roll(corners, -1, 0)
        middles = (rows + np.roll(rows, -1, 1)) / 4 + rng.uniform(-noise, noise, corners.shape)
        out[half::step, half::step] = middles
        beside = corners + np.roll(corners, -1, 1) + middles + np.roll(middles, 1, 0)
        below = corners + np.roll(corners, -1, 0) + middles + np.roll(middles, 1, 1)
        out[::step, half::step] = beside / 4 + rng.uniform(-noise, noise, corners.shape)
        out[half::step, ::step] = below / 4 + rng.uniform(-noise, noise, corners.shape)
        step, noise = half, noise / decay
    out -= out.min()
    return out / out.max()
