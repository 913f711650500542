"""What a rule gives back, and how its candidates are drawn and written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import TypeVar

from clipkit.negatives.english import as_words, write
from clipkit.negatives.tagging import Parsed, Phrase

Offer = TypeVar("Offer")

OFFERS = 2
"""Candidates made for each word that can be replaced."""


class Rewrites(list[str]):
    """Candidate rewrites of one caption, in random order; `reason` says why there are none."""

    def __init__(self, texts: Iterable[str] = (), reason: str = ""):
        super().__init__(texts)
        self.reason = reason


def draw(rng: Random, offers: Sequence[Offer]) -> list[Offer]:
    """A few offers in random order: lists are long, every caption asks, and few are needed."""
    return rng.sample(offers, min(3 * OFFERS, len(offers)))


def ordered(rng: Random, *tiers: list[str], reason: str) -> Rewrites:
    """The candidates of each tier in random order, better tiers first."""
    texts = [text for tier in tiers for text in rng.sample(tier, len(tier))]
    return Rewrites(dict.fromkeys(texts), reason="" if texts else reason)


def exchange_phrases(parsed: Parsed, a: Phrase, b: Phrase, caption: str) -> str:
    """The caption with two noun phrases, a before b, in each other's place."""
    return exchange(parsed, (a.start, a.stop), (b.start, b.stop), caption)


def exchange(parsed: Parsed, a: tuple[int, int], b: tuple[int, int], caption: str) -> str:
    """The caption with the tokens of two spans (start, stop), a before b, in each other's place."""
    words = as_words(parsed.tokens)
    order = words[: a[0]] + words[b[0] : b[1]] + words[a[1] : b[0]] + words[a[0] : a[1]] + words[b[1] :]
    return write(order, caption)
