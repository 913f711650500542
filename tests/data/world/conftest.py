"""An oracle: reads a caption by its own grammar and judges it by the scene; shares no code with the writer."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest

SIZES, TEXTURES = "small|large", "solid|striped|dotted|checked"
COLOURS = "red|orange|yellow|green|blue|purple|pink"
NOUNS = "circles?|squares?|triangles?|stars?|hearts?|cross(?:es)?|shapes?"
NUMBER = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4}
PLACE = {"left": "left", "right": "right", "above": "above", "over": "above", "below": "below", "under": "below"}

P = rf"(?:an?|the|no|one|two|three|four) (?:(?:{SIZES}|{TEXTURES}|{COLOURS}) )*(?:{NOUNS})"
REL = r"(?:to the )?(?:left|right) of|above|over|below|under"
BESIDE = r"to its left|to its right|above it|below it"
EXTRA = rf"(?P<extra>(?:(?:, and also|, together with|, and| but) {P})*)"
RELATIONS = [
    (rf"(?:there is |here is |a picture of )?(?P<a>{P}) (?:is )?(?P<rel>{REL}) (?P<b>{P}){EXTRA}"),
    (rf"(?P<rel>{REL}) (?P<b>{P}) is (?P<a>{P}){EXTRA}"),
    (rf"(?P<b>{P}) with (?P<a>{P}) (?P<rel>{BESIDE}){EXTRA}"),
]
LIST = rf"(?:a picture with |an image showing |there is |there are |here is )?(?P<list>{P}(?:(?:,| and| but) {P})*)"
LIST += "(?: can be seen)?"


def parse(text: str) -> dict[str, Any] | None:
    """Mentions, relation of the first two, background; None for what is no sentence of the world's English."""
    ground = re.search(r" (?:on|against) a (white|grey|black) background$", text)
    core = text[: ground.start()] if ground else text
    claim: dict[str, Any] = {"background": ground and ground.group(1), "relation": None}
    for pattern in RELATIONS:
        if found := re.fullmatch(pattern, core):
            phrases = [found["a"], found["b"], *re.findall(P, found["extra"])]
            place = re.search("left|right|above|over|below|under", found["rel"])
            assert place
            return claim | {"relation": PLACE[place.group()], "mentions": [_mention(p) for p in phrases]}
    if found := re.fullmatch(LIST, core):
        return claim | {"mentions": [_mention(p) for p in re.findall(P, found["list"])]}
    return None


def _mention(phrase: str) -> dict[str, Any]:
    determiner, *adjectives, noun = phrase.split()
    count = NUMBER.get(determiner)
    singular = {"crosses": "cross"}.get(noun) or (noun if noun == "cross" else noun.removesuffix("s"))
    assert (noun != singular) == ((count or 1) > 1), f"number of {phrase!r}"
    if determiner in ("a", "an"):
        following = phrase.split()[1]
        assert (determiner == "an") == (following[0] in "aeiou"), f"article of {phrase!r}"
    return {"count": count, "noun": singular, "adjectives": adjectives}


def _fits(mention: dict[str, Any], thing: dict[str, Any]) -> bool:
    looks = [thing["size"], thing["texture"], thing["colour"]]
    return mention["noun"] in ("shape", thing["shape"]) and all(a in looks for a in mention["adjectives"])


def _lies(a: dict[str, Any], b: dict[str, Any], relation: str) -> bool:
    ahead, aside = ("x", "y") if relation in ("left", "right") else ("y", "x")
    offset = a[ahead] - b[ahead] if relation in ("left", "above") else b[ahead] - a[ahead]
    return offset < 0 and abs(offset) > abs(a[aside] - b[aside])


def judge(text: str, scene: dict[str, Any]) -> bool | None:
    """Whether `text` is true of `scene` (its JSON form); None when it cannot be read."""
    claim = parse(text)
    if claim is None:
        return None
    things = scene["things"]
    if claim["background"] not in (None, scene["background"]):
        return False
    for m in claim["mentions"]:
        if m["count"] is not None and sum(_fits(m, t) for t in things) != m["count"]:
            return False
    present = [m for m in claim["mentions"] if m["count"] != 0]
    for chosen in permutations(things, len(present)):
        placed = claim["relation"] is None or _lies(chosen[0], chosen[1], claim["relation"])
        if placed and all(_fits(m, t) for m, t in zip(present, chosen)):
            return True
    return False


@pytest.fixture(scope="session")
def oracle() -> Callable[[str, dict[str, Any]], bool | None]:
    return judge
