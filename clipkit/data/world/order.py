"""Perturbed word orders of a caption, after ARO (arXiv 2210.01936), kept only where they no longer say what is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby
from random import Random

from clipkit.data.world.language import ADJECTIVES, PREPOSITIONS, Claim, Mention, article
from clipkit.data.world.scene import SHAPES, Scene

_ADJECTIVES = [w for values in ADJECTIVES.values() for w in values]
_PLACES = {text.split(" of")[0].removeprefix("to the "): r for r, texts in PREPOSITIONS.items() for text in texts}
_TRIES = 40


def perturbed_orders(caption: str, scene: Scene, rng: Random) -> tuple[str, ...] | None:
    """One perturbed caption of each of ARO's four kinds, all different; None where a kind finds none."""
    texts = [caption]
    for perturb in (_content_words, _other_words, _within_trigrams, _trigrams):
        drawn = (_with_articles(perturb(caption.split(), rng)) for _ in range(_TRIES))
        kept = next((t for t in drawn if t not in texts and not _still_true(t, caption, scene)), None)
        if kept is None:
            return None
        texts.append(kept)
    return tuple(texts[1:])


def _content_words(words: list[str], rng: Random) -> list[str]:
    """Nouns among their places, adjectives among theirs."""
    return _shuffled_where(_shuffled_where(words, rng, SHAPES.__contains__), rng, _ADJECTIVES.__contains__)


def _other_words(words: list[str], rng: Random) -> list[str]:
    """All words but nouns and adjectives among their places."""
    return _shuffled_where(words, rng, lambda w: w not in SHAPES and w not in _ADJECTIVES)


def _within_trigrams(words: list[str], rng: Random) -> list[str]:
    """The words of each three."""
    return [w for three in _threes(words) for w in rng.sample(three, len(three))]


def _trigrams(words: list[str], rng: Random) -> list[str]:
    """The threes as wholes."""
    threes = _threes(words)
    return [w for three in rng.sample(threes, len(threes)) for w in three]


def _threes(words: list[str]) -> list[list[str]]:
    return [words[i : i + 3] for i in range(0, len(words), 3)]


def _shuffled_where(words: list[str], rng: Random, chosen: Callable[[str], bool]) -> list[str]:
    places = [i for i, w in enumerate(words) if chosen(w)]
    out = list(words)
    for place, source in zip(places, rng.sample(places, len(places))):
        out[place] = words[source]
    return out


def _with_articles(words: list[str]) -> str:
    """The words with each a/an as the next word wants it."""
    following = [*words[1:], "x"]
    return " ".join(article(n) if w in ("a", "an") else w for w, n in zip(words, following))


def _still_true(text: str, caption: str, scene: Scene) -> bool:
    """Whether a perturbed caption says what it said, or something else that is true, to a lenient reader.

    Same caption: up to the order of adjectives and "is there". Something true: both phrases whole, with the place
    word between them or in front. What is no sentence at all counts as wrong, as in ARO.
    """
    if _levelled(text) == _levelled(caption):
        return True
    phrase = rf"(?:an?|the) ((?:(?:{'|'.join(_ADJECTIVES)}) )*)({'|'.join(SHAPES)})"
    place = rf"(?:is )?(?:to the )?({'|'.join(_PLACES)})(?: of)?"
    if between := re.search(rf"{phrase} {place} {phrase}", text):
        adjectives_a, a, where, adjectives_b, b = between.groups()
    elif fronted := re.search(rf"{place} {phrase} (?:there )?(?:is )?{phrase}", text):
        where, adjectives_b, b, adjectives_a, a = fronted.groups()
    else:
        return False
    mentions = Mention(a, tuple(adjectives_a.split())), Mention(b, tuple(adjectives_b.split()))
    return Claim(mentions, _PLACES[where]).holds(scene)


def _levelled(text: str) -> list[str]:
    """The words with each run of adjectives sorted."""
    runs = groupby(text.replace("is there", "there is").split(), key=_ADJECTIVES.__contains__)
    return [w for adjectives, run in runs for w in (sorted(run) if adjectives else run)]
