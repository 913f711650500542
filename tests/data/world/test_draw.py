from __future__ import annotations

from random import Random

import numpy as np
import pytest

from clipkit.data.world.draw import draw
from clipkit.data.world.scene import COLOURS, SHAPES, TEXTURES, Scene, Thing, sample_scene


def solid(colour: str, shape: str = "circle") -> Scene:
    return Scene("single", "grey", (Thing(shape, colour, "large", "solid", 0.5, 0.5),))


@pytest.mark.parametrize("size", [48, 64, 96])
def test_same_generator_same_pixels(size: int) -> None:
    scene = sample_scene(Random(0), "triple")
    first, again, other = (np.asarray(draw(scene, Random(s), size)) for s in (1, 1, 2))
    assert first.shape == (size, size, 3)
    assert (first == again).all() and (first != other).any()


def test_a_thing_lies_where_the_scene_says() -> None:
    for x, y in [(0.25, 0.5), (0.75, 0.5), (0.5, 0.25), (0.5, 0.75)]:
        scene = Scene("single", "white", (Thing("square", "blue", "small", "solid", x, y),))
        dark = 255.0 - np.asarray(draw(scene, Random(0), 64), dtype=np.float32)[..., 0]
        dark[dark < 100] = 0
        rows, columns = np.indices(dark.shape)
        assert abs((columns * dark).sum() / dark.sum() / 64 - x) < 0.03
        assert abs((rows * dark).sum() / dark.sum() / 64 - y) < 0.03


def test_colours_can_be_told_apart() -> None:
    typical = {c: _middle(solid(c), 0) for c in COLOURS}
    for seed in range(1, 15):
        for colour in COLOURS:
            seen = _middle(solid(colour), seed)
            assert min(COLOURS, key=lambda c: float(np.abs(typical[c] - seen).sum())) == colour


def _middle(scene: Scene, seed: int) -> np.ndarray:
    return np.asarray(draw(scene, Random(seed), 64), dtype=np.float32)[28:36, 28:36].mean((0, 1))


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("size", ["small", "large"])
def test_textures_show_on_every_colour(colour: str, size: str) -> None:
    for texture in TEXTURES:
        scene = Scene("single", "grey", (Thing("square", colour, size, texture, 0.5, 0.5),))
        contrast = np.asarray(draw(scene, Random(3), 64), dtype=np.float32)[27:37, 27:37].mean(2).std()
        assert (contrast > 20) == (texture != "solid")


def test_shapes_differ() -> None:
    pictures = [np.asarray(draw(solid("red", s), Random(0), 64), dtype=np.float32) for s in SHAPES]
    gaps = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(gaps) > 2.0
