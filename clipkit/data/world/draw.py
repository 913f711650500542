"""Scenes as small pictures: drawn at four times the size, reduced, with jitter in hue, size, turn, tint and noise."""

from __future__ import annotations

import colorsys
import math
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from clipkit.data.world.scene import RADIUS, Scene, Thing

SUPERSAMPLE = 4
NOISE = 3.0
"""Standard deviation of the grain, in grey levels of 255."""

Colour = tuple[int, int, int]

# hue, lightness, saturation
_COLOURS = {
    "red": (0.995, 0.45, 0.85),
    "orange": (0.075, 0.52, 0.98),
    "yellow": (0.148, 0.53, 0.95),
    "green": (0.355, 0.36, 0.75),
    "blue": (0.605, 0.47, 0.88),
    "purple": (0.765, 0.40, 0.60),
    "pink": (0.920, 0.78, 0.90),
}
_BACKGROUNDS = {"white": 240, "grey": 138, "black": 28}


def draw(scene: Scene, rng: Random, size: int) -> Image.Image:
    """The scene as an RGB picture of `size` × `size` pixels. Same scene, generator state and size: same pixels."""
    side = size * SUPERSAMPLE
    canvas = Image.fromarray(_background(scene.background, rng, size)).resize((side, side), Image.Resampling.NEAREST)
    for thing in scene.things:
        _paint(canvas, thing, rng, side)
    pixels = np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal((size, size, 1), dtype=np.float32)
    return Image.fromarray((pixels + NOISE * noise).clip(0, 255).astype(np.uint8))


def _background(name: str, rng: Random, size: int) -> np.ndarray:
    """A faintly tinted plane with a soft slope of light."""
    level = _BACKGROUNDS[name]
    tint = np.array([rng.uniform(-7, 7) for _ in range(3)], dtype=np.float32)
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 14)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = slope * (math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None])
    return (level + tint + light[..., None]).clip(0, 255).astype(np.uint8)


def _paint(canvas: Image.Image, thing: Thing, rng: Random, side: int) -> None:
    radius = RADIUS[thing.size] * side * rng.uniform(0.93, 1.07)
    turn = math.radians(rng.uniform(-12, 12))
    fill = _jittered(thing.colour, rng)
    box = math.ceil(radius * 1.25)
    x, y = round(thing.x * side), round(thing.y * side)
    outline = [(box + radius * px, box + radius * py) for px, py in _turned(thing.shape, turn)]
    mask = Image.new("L", (2 * box, 2 * box))
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    corner = (x - box, y - box)
    canvas.paste(fill, (*corner, x + box, y + box), mask)
    if thing.texture != "solid":
        pattern = _PATTERNS[thing.texture](2 * box, radius, turn, rng)
        canvas.paste(_second(fill), (*corner, x + box, y + box), ImageChops.multiply(mask, pattern))
    edge = Image.new("L", (2 * box, 2 * box))
    ImageDraw.Draw(edge).line([*outline, *outline[:2]], fill=255, width=round(0.012 * side) + 1, joint="curve")
    canvas.paste(_mixed(fill, (0, 0, 0), 0.45), (*corner, x + box, y + box), edge)


def _jittered(name: str, rng: Random) -> Colour:
    hue, light, saturation = _COLOURS[name]
    r, g, b = colorsys.hls_to_rgb(
        (hue + rng.uniform(-0.012, 0.012)) % 1.0,
        light + rng.uniform(-0.03, 0.03),
        min(1.0, saturation * rng.uniform(0.9, 1.05)),
    )
    return round(255 * r), round(255 * g), round(255 * b)


def _second(fill: Colour) -> Colour:
    """The colour of stripes, dots and checks: paler, or darker where the fill itself is pale (yellow, pink)."""
    luma = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    return _mixed(fill, (255, 255, 255), 0.78) if luma < 170 else _mixed(fill, (40, 30, 30), 0.62)


def _mixed(colour: Colour, other: Colour, share: float) -> Colour:
    r, g, b = (round((1 - share) * c + share * o) for c, o in zip(colour, other))
    return r, g, b


@cache
def _corners(shape: str) -> list[tuple[float, float]]:
    """The outline around (0, 0), about one unit in radius, y downwards."""
    if shape == "circle":
        return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 48, endpoint=False).tolist()]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -1.05), (1.06, 0.80), (-1.06, 0.80)]
    if shape == "star":
        spikes = [(1.14 if i % 2 == 0 else 0.48, math.pi * i / 5) for i in range(10)]
        return [(r * math.sin(a), 0.04 - r * math.cos(a)) for r, a in spikes]
    if shape == "cross":
        arm, reach = 0.35, 1.0
        quarter = [(arm, -reach), (arm, -arm), (reach, -arm)]
        return [p for k in range(4) for p in (_rotate(q, k * math.pi / 2) for q in quarter)]
    assert shape == "heart"
    turns = np.linspace(0, 2 * math.pi, 48, endpoint=False).tolist()
    return [(1.02 * math.sin(t) ** 3, -_heart_height(t) / 15.5) for t in turns]


def _heart_height(t: float) -> float:
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5


def _rotate(point: tuple[float, float], angle: float) -> tuple[float, float]:
    (x, y), c, s = point, math.cos(angle), math.sin(angle)
    return c * x - s * y, s * x + c * y


def _turned(shape: str, angle: float) -> list[tuple[float, float]]:
    return [_rotate(point, angle) for point in _corners(shape)]


def _striped(box: int, radius: float, turn: float, rng: Random) -> Image.Image:
    """Slanting bands."""
    pattern = Image.new("L", (box, box))
    pen = ImageDraw.Draw(pattern)
    period = _period(radius, 0.62)
    phase = rng.uniform(0, period)
    reach = 2 * box
    for k in range(-4, round(2 * box / period) + 1):
        start = k * period + phase - box / 2
        band = [(start, -box), (start + 0.45 * period, -box), (start + 0.45 * period, reach), (start, reach)]
        pen.polygon([_about(point, box / 2, turn + math.pi / 4) for point in band], fill=255)
    return pattern


def _dotted(box: int, radius: float, turn: float, rng: Random) -> Image.Image:
    """Round spots on a staggered grid."""
    pattern = Image.new("L", (box, box))
    pen = ImageDraw.Draw(pattern)
    step = _period(radius, 0.60)
    dot = 0.27 * step
    dx, dy = rng.uniform(0, step), rng.uniform(0, step)
    count = round(box / step) + 2
    for i in range(-2, count):
        for j in range(-2, count):
            place = ((i + 0.5 * (j % 2)) * step + dx, 0.9 * j * step + dy)
            x, y = _about(place, box / 2, turn)
            pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=255)
    return pattern


def _checked(box: int, radius: float, turn: float, rng: Random) -> Image.Image:
    """A chequerboard along the sides of the shape."""
    pattern = Image.new("L", (box, box))
    pen = ImageDraw.Draw(pattern)
    step = _period(radius, 0.50)
    dx, dy = rng.uniform(0, step), rng.uniform(0, step)
    count = round(box / step) + 3
    for i in range(-3, count):
        for j in range(-3 + (i + 1) % 2, count, 2):
            left, top = i * step + dx, j * step + dy
            square = [(left, top), (left + step, top), (left + step, top + step), (left, top + step)]
            pen.polygon([_about(point, box / 2, turn) for point in square], fill=255)
    return pattern


_PATTERNS = {"striped": _striped, "dotted": _dotted, "checked": _checked}


def _period(radius: float, share: float) -> float:
    """Pattern pitch in supersampled pixels: a share of the radius, but never too fine to survive the reduction."""
    return max(share * radius, 3.6 * SUPERSAMPLE)


def _about(point: tuple[float, float], centre: float, angle: float) -> tuple[float, float]:
    x, y = _rotate((point[0] - centre, point[1] - centre), angle)
    return x + centre, y + centre
