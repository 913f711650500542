"""Negatives with pictures of their own, for training: a scene one change away, with a caption true there alone."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from clipkit.data.world.language import describe, sample_style, word
from clipkit.data.world.scene import Scene, novel
from clipkit.data.world.tasks import altered, mirrored, recoloured

TRIES = 8
"""Claims about a changed scene that are tried until one is false of the scene itself."""

Change = Callable[[Scene, Random], Scene]
CHANGES: dict[str, Change] = {
    "swap_places": lambda scene, rng: mirrored(scene),
    "swap_colours": lambda scene, rng: recoloured(scene),
    "replace_shape": lambda scene, rng: altered(scene, "shape", rng),
    "replace_colour": lambda scene, rng: altered(scene, "colour", rng),
}
OF_PAIRS = ("swap_places", "swap_colours")


def variants(scene: Scene, rng: Random, count: int) -> list[tuple[str, str, Scene]]:
    """Up to `count` (kind, caption, changed scene), of different kinds; a group of equal things has none.

    Scenes that are kept for the evaluation sets do not come up.
    """
    kinds = [kind for kind in CHANGES if scene.kind == "pair" or kind not in OF_PAIRS] if scene.kind != "group" else []
    found: list[tuple[str, str, Scene]] = []
    for kind in rng.sample(kinds, len(kinds)):
        if len(found) == count:
            break
        other = CHANGES[kind](scene, rng)
        claims = (describe(other, rng) for _ in range(TRIES))
        claim = next((claim for claim in claims if not claim.holds(scene)), None)
        if claim and not novel(other):
            found.append((kind, word(claim, sample_style(rng)), other))
    return found
