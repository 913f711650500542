"""Putting words back together: articles, capitals and spaces. A word is (text, the space before it)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from clipkit.negatives.lexicon import lexicon
from clipkit.negatives.tagging import Parsed, Token

Word = tuple[str, str]

_ARTICLES = ("a", "an", "A", "An")

_VOWEL_SOUND = re.compile("hour|honest|heir|honor|[fhlmnrsx]-|[aefhilmnorsx]([^a-z]|$)")
_CONSONANT_SOUND = re.compile("uni([^nmd]|$)|us[aeiu]|eu|ewe|one|once|u[^a-z]|ut[ei]|ura|ubi|ukr|ukul")


@lru_cache(maxsize=65536)
def article(word: str) -> str:
    """a or an, by the sound a word begins with."""
    word = word.lower()
    if _VOWEL_SOUND.match(word):
        return "an"
    return "an" if word[:1] in tuple("aeiou") and not _CONSONANT_SOUND.match(word) else "a"


def as_words(tokens: Sequence[Token]) -> list[Word]:
    """The words of tokens, with their spaces; the first may move on and then needs one."""
    return [(token.text, token.gap if i else " ") for i, token in enumerate(tokens)]


def write(words: Sequence[Word], original: str) -> str:
    """A caption from words moved or exchanged: articles agree, the capital stands where the original had one.

    Articles before a word they already stood before in the original are left as they were.
    """
    texts = [text for text, _ in words]
    gaps = ["", *(gap for _, gap in words[1:])]
    _agree(texts, original)
    if is_capitalised(original):
        _capitalise(texts, original)
    for i, text in enumerate(texts):
        if i and not gaps[i] and text[:1].isalnum() and texts[i - 1][-1:].isalnum():
            gaps[i] = " "
    text = "".join([part for pair in zip(gaps, texts) for part in pair])
    return text.upper() if original.isupper() else text


def put(parsed: Parsed, changes: dict[int, str], original: str) -> str:
    """The caption with the tokens at some positions replaced."""
    words = as_words(parsed.tokens)
    for i, text in changes.items():
        words[i] = (text, words[i][1])
    return write(words, original)


def is_capitalised(text: str) -> bool:
    """Whether a text begins like a sentence (not with an abbreviation, not all in capitals)."""
    return text[:1].isupper() and not text[1:2].isupper() and not text.isupper()


def _agree(texts: list[str], original: str) -> None:
    known: set[tuple[str, str]] = set()
    for i, text in enumerate(texts[:-1]):
        if text not in _ARTICLES:
            continue
        if not known:
            before = original.lower().split()
            known = set(pairwise(before))
        following = texts[i + 1].lower()
        right = article(following)
        if text.lower() != right and (text.lower(), following) not in known:
            texts[i] = right.capitalize() if text[0] == "A" else right


def _capitalise(texts: list[str], original: str) -> None:
    first, *others = original.split()
    places = [i for i, text in enumerate(texts) if i and text == first]
    if first != "I" and first.lower() not in lexicon().names:
        for i in places[: len(places) - others.count(first)]:  # as many as moved there: "group A" stays
            texts[i] = first.lower()
    texts[0] = texts[0][:1].upper() + texts[0][1:]
