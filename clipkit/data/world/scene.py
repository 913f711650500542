"""What a picture of the world holds: the vocabulary, structured scenes, and how they are drawn by lot.

A scene is up to four things on a plain background. Coordinates are fractions of the picture's side, y downwards.
Training scenes never hold a *reserved* pair (see `reserved`), so that tests can tell new compositions from seen ones.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from itertools import combinations
from random import Random
from typing import Any

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted", "checked")
BACKGROUNDS = ("white", "grey", "black")
CONVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
RELATIONS = tuple(CONVERSE)

PROPERTIES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
"""What can be said of one thing, and the values each can take."""

KINDS = {"pair": 0.60, "single": 0.25, "triple": 0.05, "group": 0.10}
"""Share of each kind of scene: two different things, one, three different ones, one to four alike."""

SOLID = 0.6
"""Share of things without a pattern; the patterns share the rest."""

RADIUS = {"small": 0.125, "large": 0.205}
"""Half the breadth of a thing before jitter."""

RELATION_MARGIN = 0.12
"""A relation holds where the offset along its axis exceeds the other offset by this much; diagonals have none."""


@dataclass(frozen=True)
class Thing:
    """One drawn object."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float

    @property
    def name(self) -> tuple[str, str]:
        """Colour and shape: no two different things of a scene share both."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Everything true of a picture; `kind` is a key of KINDS."""

    kind: str
    background: str
    things: tuple[Thing, ...]

    def to_json(self) -> dict[str, Any]:
        """The form stored in shards and rows."""
        return {"kind": self.kind, "background": self.background, "things": [asdict(t) for t in self.things]}


def scene_from_json(tree: dict[str, Any]) -> Scene:
    """Inverse of `Scene.to_json`."""
    return Scene(tree["kind"], tree["background"], tuple(Thing(**t) for t in tree["things"]))


def relation(a: Thing, b: Thing) -> str | None:
    """Where `a` lies seen from `b`; None where it is not clear."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy) + RELATION_MARGIN:
        return "left" if dx < 0 else "right"
    if abs(dy) > abs(dx) + RELATION_MARGIN:
        return "above" if dy < 0 else "below"
    return None


def reserved(a: Thing, b: Thing) -> bool:
    """Whether these two (by colour and shape) are kept apart in training: a fixed tenth of all pairs."""
    names = sorted([" ".join(a.name), " ".join(b.name)])
    return zlib.crc32("+".join(names).encode()) % 10 == 0


def novel(scene: Scene) -> bool:
    """Whether the scene holds a reserved pair, which no training scene does."""
    return any(reserved(a, b) for a, b in combinations(scene.things, 2))


def sample_scene(rng: Random, kind: str | None = None) -> Scene:
    """A scene by lot, of the given kind or of any (by KINDS)."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    make = {"pair": _pair, "single": _single, "triple": _triple, "group": _group}[kind]
    return Scene(kind, rng.choice(BACKGROUNDS), make(rng))


def sample_training_scene(rng: Random) -> Scene:
    """A scene by lot without reserved pairs."""
    scene = sample_scene(rng)
    while novel(scene):
        scene = sample_scene(rng)
    return scene


def _looks(rng: Random, count: int) -> list[dict[str, str]]:
    """Properties of `count` things, no two with the same colour and shape."""
    looks: dict[tuple[str, str], dict[str, str]] = {}
    while len(looks) < count:
        one = {name: rng.choice(values) for name, values in PROPERTIES.items()}
        one["texture"] = "solid" if rng.random() < SOLID else rng.choice(TEXTURES[1:])
        looks.setdefault((one["colour"], one["shape"]), one)
    return list(looks.values())


def _pair(rng: Random) -> tuple[Thing, ...]:
    """One thing in each half of the picture, side by side or one above the other."""
    first, second = _looks(rng, 2)
    shared = rng.uniform(0.30, 0.70)
    placed = []
    for look, half in ((first, 0.0), (second, 0.5)):
        radius = RADIUS[look["size"]]
        along = half + rng.uniform(radius + 0.025, 0.5 - radius - 0.025)
        placed.append((look, along, shared + rng.uniform(-0.06, 0.06)))
    upright = rng.random() < 0.5
    things = [_thing(look, across, along) if upright else _thing(look, along, across) for look, along, across in placed]
    rng.shuffle(things)
    return tuple(things)


def _single(rng: Random) -> tuple[Thing, ...]:
    (look,) = _looks(rng, 1)
    low = RADIUS[look["size"]] + 0.05
    return (_thing(look, rng.uniform(low, 1 - low), rng.uniform(low, 1 - low)),)


def _triple(rng: Random) -> tuple[Thing, ...]:
    return _in_quarters(rng, _looks(rng, 3))


def _group(rng: Random) -> tuple[Thing, ...]:
    return _in_quarters(rng, _looks(rng, 1) * rng.randint(1, 4))


def _in_quarters(rng: Random, looks: list[dict[str, str]]) -> tuple[Thing, ...]:
    """At most four things, each in a quarter of the picture of its own."""
    things = []
    for look, quarter in zip(looks, rng.sample(range(4), len(looks))):
        slack = 0.24 - RADIUS[look["size"]]
        x = 0.26 + 0.48 * (quarter % 2) + rng.uniform(-slack, slack)
        y = 0.26 + 0.48 * (quarter // 2) + rng.uniform(-slack, slack)
        things.append(_thing(look, x, y))
    return tuple(things)


def _thing(look: dict[str, str], x: float, y: float) -> Thing:
    return Thing(**look, x=round(x, 3), y=round(y, 3))
