"""What can be said of a scene: claims, whether they hold, and their wording by varied templates.

A caption is a `Claim` (what it says) worded in a `Style` (how it says it). Truth is decided on the claim alone, so a
negative is the wording of a claim that does not hold, in the same style as its positive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, permutations
from random import Random

from clipkit.data.world.scene import (
    BACKGROUNDS,
    COLOURS,
    CONVERSE,
    PROPERTIES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    relation,
)

NUMBERS = ("no", "one", "two", "three", "four")
ADJECTIVES = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS}
"""Adjectives of a thing by what they describe, in the order they stand in."""
ANY_SHAPE = "shape"
"""The noun that fits every thing."""

PREPOSITIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_BESIDE_IT = {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"}

_RELATED = {"{a} {rel} {b}": 3, "{a} is {rel} {b}": 3, "there is {a} {rel} {b}": 2, "a picture of {a} {rel} {b}": 2}
"""Wordings of "a lies REL of b" that name a before b."""
_TURNED = {"{rel} {b} is {a}": 1, "{b} with {a} {beside}": 1}
"""Wordings that name b first."""
_LISTED = {"{x}": 3, "a picture with {x}": 2, "an image showing {x}": 2, "there {is} {x}": 3, "{x} can be seen": 1}
_ALSO = (", and also {x}", ", together with {x}")
_BUT = (" but {x}", ", and {x}")
_BEFORE = (" on a {b} background", " against a {b} background")


@dataclass(frozen=True)
class Mention:
    """Something spoken of: a noun with adjectives. `count` None: at least one ("a"); 0: none; n: exactly n."""

    noun: str
    adjectives: tuple[str, ...] = ()
    count: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the words are true of `thing`."""
        return self.noun in (thing.shape, ANY_SHAPE) and {*self.adjectives} <= {thing.size, thing.texture, thing.colour}


@dataclass(frozen=True)
class Claim:
    """What a caption says: these mentions, the first lying `relation` of the second, on this background."""

    mentions: tuple[Mention, ...]
    relation: str | None = None
    background: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether different things of the scene fit all mentions, counts and relation."""
        if self.background not in (None, scene.background):
            return False
        counted = [m for m in self.mentions if m.count is not None]
        if any(sum(m.fits(t) for t in scene.things) != m.count for m in counted):
            return False
        present = [m for m in self.mentions if m.count != 0]
        return any(
            all(m.fits(t) for m, t in zip(present, things))
            and (self.relation is None or relation(things[0], things[1]) == self.relation)
            for things in permutations(scene.things, len(present))
        )

    def turned(self) -> Claim:
        """The same said from the other side: "a left of b" as "b right of a"."""
        assert self.relation is not None
        a, b, *rest = self.mentions
        return replace(self, mentions=(b, a, *rest), relation=CONVERSE[self.relation])


@dataclass(frozen=True)
class Style:
    """A choice for everything the claim leaves open. Any style words any claim."""

    related: str
    listed: str
    definite: bool
    preposition: int
    also: str
    but: str
    before: str


def sample_style(rng: Random, *, turned: bool = True, definite: bool = True) -> Style:
    """A style by lot; `turned=False` keeps to wordings in the claim's own order, `definite=False` to "a"."""
    related = _RELATED | _TURNED if turned else _RELATED
    return Style(
        related=rng.choices(list(related), list(related.values()))[0],
        listed=rng.choices(list(_LISTED), list(_LISTED.values()))[0],
        definite=definite and rng.random() < 0.15,
        preposition=rng.randrange(2),
        also=rng.choice(_ALSO),
        but=rng.choice(_BUT),
        before=rng.choice(_BEFORE),
    )


def word(claim: Claim, style: Style) -> str:
    """The claim as a lower-case English phrase or sentence."""
    phrases = [_phrase(m, style.definite) for m in claim.mentions]
    if claim.relation is None:
        plural = (claim.mentions[0].count or 1) > 1
        text = style.listed.format(x=_joined(claim, phrases), **{"is": "are" if plural else "is"})
    else:
        text = style.related.format(
            a=phrases[0],
            b=phrases[1],
            rel=PREPOSITIONS[claim.relation][style.preposition],
            beside=_BESIDE_IT[claim.relation],
        )
        for mention, phrase in zip(claim.mentions[2:], phrases[2:]):
            text += (style.but if mention.count == 0 else style.also).format(x=phrase)
    if style.definite:
        text = text.replace("there is ", "here is ")
    return text + (style.before.format(b=claim.background) if claim.background else "")


def _joined(claim: Claim, phrases: list[str]) -> str:
    *head, last = phrases
    if not head:
        return last
    return ", ".join(head) + (" but " if claim.mentions[-1].count == 0 else " and ") + last


def _phrase(mention: Mention, definite: bool) -> str:
    noun = plural(mention.noun) if (mention.count or 1) > 1 else mention.noun
    words = " ".join([*mention.adjectives, noun])
    if mention.count is not None:
        return f"{NUMBERS[mention.count]} {words}"
    return f"the {words}" if definite else f"{article(words)} {words}"


def article(words: str) -> str:
    """`a` or `an`."""
    return "an" if words[0] in "aeiou" else "a"


def plural(noun: str) -> str:
    """The plural of a noun of the vocabulary."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def captions(scene: Scene, rng: Random) -> list[str]:
    """Two to four different true captions, each with its own content, direction and wording."""
    count = rng.randint(2, 4)
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[word(describe(scene, rng), sample_style(rng))] = None
    return list(texts)


def describe(scene: Scene, rng: Random) -> Claim:
    """A true claim by lot, naming most of what is to be seen."""
    claim = _DESCRIBE[scene.kind](scene, rng)
    return replace(claim, background=scene.background) if rng.random() < 0.3 else claim


def describe_relation(scene: Scene, rng: Random) -> Claim:
    """A true claim of where a thing lies seen from another; the scene has such a pair."""
    speak = _Speaker(rng).mention
    clear = [(a, b) for a, b in combinations(scene.things, 2) if relation(a, b)]
    a, b = rng.choice(clear)
    claim = Claim((speak(a), speak(b)), relation(a, b))
    return claim if rng.random() < 0.5 else claim.turned()


def absent(scene: Scene, rng: Random) -> Mention:
    """Something the scene does not hold, as a mention with count 0."""
    while True:
        adjectives = (rng.choice(COLOURS),) if rng.random() < 0.5 else ()
        mention = Mention(rng.choice(SHAPES), adjectives, 0)
        if not any(mention.fits(t) for t in scene.things):
            return mention


def _describe_pair(scene: Scene, rng: Random) -> Claim:
    draw = rng.random()
    if draw < 0.04:
        return Claim((_Speaker(rng).mention(rng.choice(scene.things)),))
    if draw < 0.10:
        return Claim(_all(scene, rng))
    claim = describe_relation(scene, rng)
    return replace(claim, mentions=(*claim.mentions, absent(scene, rng))) if draw < 0.15 else claim


def _describe_single(scene: Scene, rng: Random) -> Claim:
    draw = rng.random()
    (thing,) = scene.things
    if draw < 0.05:
        return Claim((absent(scene, rng),))
    if draw < 0.15:
        name = rng.choice([thing.colour, thing.texture])
        return Claim((Mention(ANY_SHAPE, (name,)),))
    mention = _Speaker(rng).mention(thing)
    if draw < 0.35:
        return Claim((mention, absent(scene, rng)))
    return Claim((replace(mention, count=1),)) if draw < 0.50 else Claim((mention,))


def _describe_triple(scene: Scene, rng: Random) -> Claim:
    if rng.random() < 0.3:
        return Claim(_all(scene, rng))
    speak = _Speaker(rng).mention
    things = list(scene.things)
    rng.shuffle(things)
    a, b, c = next(p for p in permutations(things) if relation(p[0], p[1]))
    return Claim((speak(a), speak(b), speak(c)), relation(a, b))


def _describe_group(scene: Scene, rng: Random) -> Claim:
    return Claim((replace(_Speaker(rng).mention(scene.things[0]), count=len(scene.things)),))


_DESCRIBE = {
    "pair": _describe_pair,
    "single": _describe_single,
    "triple": _describe_triple,
    "group": _describe_group,
}


def _all(scene: Scene, rng: Random) -> tuple[Mention, ...]:
    speak = _Speaker(rng).mention
    return tuple(speak(t) for t in rng.sample(scene.things, len(scene.things)))


class _Speaker:
    """Speaks of things at one level of detail, so that the phrases of a caption run parallel."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.named = {"colour": rng.random() < 0.6, "size": rng.random() < 0.3, "texture": rng.random() < 0.4}

    def mention(self, thing: Thing) -> Mention:
        named = [name for name in ADJECTIVES if self.named[name]]
        if thing.texture == "solid" and "texture" in named and self.rng.random() < 0.6:
            named.remove("texture")
        return Mention(thing.shape, tuple(getattr(thing, name) for name in named))


def tags(scene: Scene) -> list[str]:
    """Shapes, colours and textures that are to be seen, by the alphabet."""
    return sorted({word for thing in scene.things for word in (thing.shape, thing.colour, thing.texture)})


def vocabulary() -> dict[str, object]:
    """Nouns with their plurals, adjectives and prepositions by what they describe, numbers."""
    return {
        "nouns": {noun: plural(noun) for noun in (*SHAPES, ANY_SHAPE)},
        "adjectives": {name: list(values) for name, values in PROPERTIES.items() if name != "shape"}
        | {"background": list(BACKGROUNDS)},
        "relations": {name: list(PREPOSITIONS[name]) for name in RELATIONS},
        "numbers": list(NUMBERS),
    }
