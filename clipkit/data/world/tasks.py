"""Compositional test rows from scenes: every task form, each wrong text false of the picture and each right one true.

Forms (pictures × texts): 1x2 pairs of captions, 1x4 choice, 1x5 order, 2x2 (Winoground), 2x1 (one text, two pictures).
Where a wrong text is a rewrite of the right one it has the same wording and detail, so neither length nor style tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from clipkit.data.world.language import (
    ADJECTIVES,
    Claim,
    Mention,
    Style,
    absent,
    describe_relation,
    sample_style,
    word,
)
from clipkit.data.world.order import perturbed_orders
from clipkit.data.world.scene import CONVERSE, PROPERTIES, RELATIONS, SHAPES, Scene, novel


@dataclass(frozen=True)
class Row:
    """A test item before its pictures are drawn: `match[i][j]` is 1 where text j is true of scene i, else 0."""

    category: str
    scenes: tuple[Scene, ...]
    texts: tuple[str, ...]
    match: tuple[tuple[int, ...], ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> str:
        """Pictures × texts."""
        return f"{len(self.scenes)}x{len(self.texts)}"


Task = Callable[[Scene, Random], Row | None]


def make_row(category: str, scene: Scene, rng: Random) -> Row | None:
    """A row of `category` on `scene`, its texts and pictures in random order; None where the scene does not suit."""
    kinds, task = TASKS[category]
    row = task(scene, rng) if scene.kind in kinds else None
    if row is None:
        return None
    down = rng.sample(range(len(row.scenes)), len(row.scenes))
    across = rng.sample(range(len(row.texts)), len(row.texts))
    return replace(
        row,
        category=category,
        scenes=tuple(row.scenes[i] for i in down),
        texts=tuple(row.texts[j] for j in across),
        match=tuple(tuple(row.match[i][j] for j in across) for i in down),
        meta={"form": row.form, "novel": any(novel(s) for s in row.scenes)} | row.meta,
    )


def _choice(scene: Scene, claims: list[Claim | None], style: Style, **meta: Any) -> Row | None:
    """The first claim, which is true, against the others; None unless those exist and are false."""
    wrong = [c for c in claims[1:] if c is not None and not c.holds(scene)]
    if len(wrong) < len(claims) - 1:
        return None
    texts = tuple(word(c, style) for c in claims if c is not None)
    return Row("", (scene,), texts, ((1, *[0] * len(wrong)),), meta)


def _edit(change: Callable[[Claim, Scene, Random], tuple[Claim | None, dict[str, Any]]]) -> Task:
    """The task "own caption or its rewrite" for a way to rewrite a relation claim."""

    def task(scene: Scene, rng: Random) -> Row | None:
        claim = describe_relation(scene, rng)
        changed, meta = change(claim, scene, rng)
        return _choice(scene, [claim, changed], sample_style(rng), **meta)

    return task


# Rewrites of a claim "a lies REL of b". None where the claim does not allow it.


def exchange_objects(claim: Claim) -> Claim:
    """a and b change places in the sentence."""
    a, b, *rest = claim.mentions
    return replace(claim, mentions=(b, a, *rest))


def exchange_colours(claim: Claim) -> Claim | None:
    """a and b change colours; needs two shapes and two colours, both named."""
    a, b, *rest = claim.mentions
    colour_a, colour_b = _named(a, "colour"), _named(b, "colour")
    if a.noun == b.noun or colour_a == colour_b or not (colour_a and colour_b):
        return None
    return replace(claim, mentions=(_swap(a, colour_a, colour_b), _swap(b, colour_b, colour_a), *rest))


def _named(mention: Mention, attribute: str) -> str | None:
    return next((w for w in mention.adjectives if w in PROPERTIES[attribute]), None)


def _swap(mention: Mention, old: str, new: str) -> Mention:
    return replace(mention, adjectives=tuple(new if w == old else w for w in mention.adjectives))


def _with(claim: Claim, place: int, mention: Mention) -> Claim:
    mentions = list(claim.mentions)
    mentions[place] = mention
    return replace(claim, mentions=tuple(mentions))


def _swap_object(claim: Claim, scene: Scene, rng: Random) -> tuple[Claim | None, dict[str, Any]]:
    return exchange_objects(claim), {}


def _swap_attribute(claim: Claim, scene: Scene, rng: Random) -> tuple[Claim | None, dict[str, Any]]:
    return exchange_colours(claim), {"attribute": "colour"}


def _replace_object(claim: Claim, scene: Scene, rng: Random) -> tuple[Claim | None, dict[str, Any]]:
    place = rng.randrange(2)
    shape = rng.choice([s for s in SHAPES if s not in {t.shape for t in scene.things}])
    return _with(claim, place, replace(claim.mentions[place], noun=shape)), {}


def _replace_attribute(claim: Claim, scene: Scene, rng: Random) -> tuple[Claim | None, dict[str, Any]]:
    place = rng.randrange(2)
    mention = claim.mentions[place]
    named = [name for name in ADJECTIVES if _named(mention, name)]
    if not named:
        return None, {}
    attribute = rng.choice(named)
    old = _named(mention, attribute) or ""
    new = rng.choice([v for v in PROPERTIES[attribute] if v != old])
    return _with(claim, place, _swap(mention, old, new)), {"attribute": attribute}


def _replace_relation(claim: Claim, scene: Scene, rng: Random) -> tuple[Claim | None, dict[str, Any]]:
    assert claim.relation is not None
    opposite = CONVERSE[claim.relation]
    others = [r for r in RELATIONS if r not in (claim.relation, opposite)]
    relation = opposite if rng.random() < 0.5 else rng.choice(others)
    return replace(claim, relation=relation), {"to": "opposite" if relation == opposite else "other"}


def _add_object(claim: Claim, scene: Scene, rng: Random) -> tuple[Claim | None, dict[str, Any]]:
    shape = rng.choice([s for s in SHAPES if s not in {t.shape for t in scene.things}])
    like = rng.choice(claim.mentions)
    names = tuple(rng.choice(values) for values in ADJECTIVES.values() if {*values} & {*like.adjectives})
    return replace(claim, mentions=(*claim.mentions, Mention(shape, names))), {}


def _add_attribute(claim: Claim, scene: Scene, rng: Random) -> tuple[Claim | None, dict[str, Any]]:
    place = rng.randrange(2)
    mention = claim.mentions[place]
    unnamed = [name for name in ADJECTIVES if not _named(mention, name)]
    if not unnamed:
        return None, {}
    attribute = rng.choice(unnamed)
    values = {name: _named(mention, name) for name in ADJECTIVES} | {attribute: rng.choice(PROPERTIES[attribute])}
    adjectives = tuple(v for v in values.values() if v)
    return _with(claim, place, replace(mention, adjectives=adjectives)), {"attribute": attribute}


def _choice_1x4(scene: Scene, rng: Random) -> Row | None:
    """Objects exchanged or not × colours exchanged or not: all four have the same words."""
    claim = describe_relation(scene, rng)
    colours = exchange_colours(claim)
    both = exchange_objects(colours) if colours else None
    return _choice(scene, [claim, exchange_objects(claim), colours, both], sample_style(rng))


def _winoground(scene: Scene, rng: Random) -> Row | None:
    """Two pictures and two captions of the same words: places or colours exchanged."""
    claim, style = describe_relation(scene, rng), sample_style(rng)
    change = rng.choice(["roles", "colours"])
    other_scene = mirrored(scene) if change == "roles" else recoloured(scene)
    other = exchange_objects(claim) if change == "roles" else exchange_colours(claim)
    if other is None or other.holds(scene) or claim.holds(other_scene) or not other.holds(other_scene):
        return None
    return Row("", (scene, other_scene), (word(claim, style), word(other, style)), ((1, 0), (0, 1)), {"change": change})


def _t2i_choice(scene: Scene, rng: Random) -> Row | None:
    """One caption, its picture and one that differs in places, in who has which colour, in one shape or one colour."""
    claim = describe_relation(scene, rng)
    change = rng.choice(["roles", "colours", "shape", "colour"])
    if change == "roles":
        other = mirrored(scene)
    elif change == "colours":
        other = recoloured(scene)
    else:
        other = altered(scene, change, rng)
    if claim.holds(other):
        return None
    return Row("", (scene, other), (word(claim, sample_style(rng)),), ((1,), (0,)), {"change": change})


def mirrored(scene: Scene) -> Scene:
    """A pair with its places exchanged: mirrored along the axis the two lie on."""
    a, b = scene.things
    if abs(a.x - b.x) > abs(a.y - b.y):
        return replace(scene, things=tuple(replace(t, x=round(1 - t.x, 3)) for t in scene.things))
    return replace(scene, things=tuple(replace(t, y=round(1 - t.y, 3)) for t in scene.things))


def recoloured(scene: Scene) -> Scene:
    """A pair with its colours exchanged."""
    a, b = scene.things
    return replace(scene, things=(replace(a, colour=b.colour), replace(b, colour=a.colour)))


def altered(scene: Scene, name: str, rng: Random) -> Scene:
    """One thing given another shape or colour, one that the scene does not hold."""
    place = rng.randrange(len(scene.things))
    taken = {getattr(t, name) for t in scene.things}
    changed = replace(scene.things[place], **{name: rng.choice([v for v in PROPERTIES[name] if v not in taken])})
    return replace(scene, things=tuple(changed if i == place else t for i, t in enumerate(scene.things)))


def _counting(scene: Scene, rng: Random) -> Row | None:
    thing, count = scene.things[0], len(scene.things)
    adjectives = tuple(getattr(thing, name) for name in ADJECTIVES if rng.random() < 0.6)
    claim = Claim((Mention(thing.shape, adjectives, count),))
    other = rng.choice([n for n in range(1, 5) if n != count])
    wrong = replace(claim, mentions=(replace(claim.mentions[0], count=other),))
    return _choice(scene, [claim, wrong], sample_style(rng), count=count, other=other)


def _existence(scene: Scene, rng: Random) -> Row | None:
    """Presence against absence, absence against presence, or "a but no b" with the two shapes exchanged."""
    thing, missing = rng.choice(scene.things), absent(scene, rng)
    present = Mention(thing.shape, (thing.colour,) if missing.adjectives else ())
    style = sample_style(rng, definite=False)
    variant = rng.choice(["present", "absent", "but"])
    if variant == "present":
        right, wrong = (present,), (replace(present, count=0),)
    elif variant == "absent":
        right, wrong = (missing,), (replace(missing, count=None),)
    else:
        right = (present, missing)
        wrong = (replace(present, noun=missing.noun), replace(missing, noun=present.noun))
    return _choice(scene, [Claim(right), Claim(wrong)], style, variant=variant)


def _order(scene: Scene, rng: Random) -> Row | None:
    """The caption against four perturbed orders of its words."""
    claim = describe_relation(scene, rng)
    text = word(claim, sample_style(rng, turned=False))
    wrong = perturbed_orders(text, scene, rng)
    return Row("", (scene,), (text, *wrong), ((1, 0, 0, 0, 0),)) if wrong else None


_PAIR = ("pair",)
TASKS: dict[str, tuple[tuple[str, ...], Task]] = {
    "replace_object": (_PAIR, _edit(_replace_object)),
    "replace_attribute": (_PAIR, _edit(_replace_attribute)),
    "replace_relation": (_PAIR, _edit(_replace_relation)),
    "swap_object": (_PAIR, _edit(_swap_object)),
    "swap_attribute": (_PAIR, _edit(_swap_attribute)),
    "add_object": (_PAIR, _edit(_add_object)),
    "add_attribute": (_PAIR, _edit(_add_attribute)),
    "choice_1x4": (_PAIR, _choice_1x4),
    "winoground": (_PAIR, _winoground),
    "t2i_choice": (_PAIR, _t2i_choice),
    "order": (_PAIR, _order),
    "counting": (("group",), _counting),
    "existence": (("pair", "single"), _existence),
}
"""Category -> the kinds of scene it wants, and its task."""
