"""The same words in another order, for the kind reshuffle."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from random import Random

from clipkit.negatives.english import as_words, is_capitalised, put, write
from clipkit.negatives.lexicon import lexicon
from clipkit.negatives.swaps import equivalent
from clipkit.negatives.tagging import Parsed, parse


def reorder(caption: str, rng: Random, draws: int) -> list[str]:
    """The caption in `draws` other orders, and with its noun phrases exchanged all round; none says the same."""
    body, ending = _body(caption)
    if is_capitalised(caption) and body[0] != "I" and body[0].lower() not in lexicon().names:
        body[0] = body[0][:1].lower() + body[0][1:]
    parsed, texts = parse(caption), []
    for order in rng.sample(_ORDERS, draws):
        if isinstance(order, str):
            texts.append(_shuffle_letters(parsed, order, caption, rng))
        else:
            texts.append(write([(word, " ") for word in order(body, rng)], caption) + ending)
    if len(parsed.phrases) > 2 and not _is_list(parsed):
        texts.append(_rotate_phrases(parsed, caption, rng))
    return [text for text in texts if not _says_the_same(text, parsed, caption)]


def _body(caption: str) -> tuple[list[str], str]:
    """The words, and the final punctuation with the space before it."""
    match = re.search(r"\s*[.!?]*\s*$", caption)
    assert match is not None
    return caption[: match.start()].split(), match.group()


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _words(body: list[str], rng: Random) -> list[str]:
    return rng.sample(body, len(body))


def _chunks(body: list[str]) -> list[list[str]]:
    return [body[i : i + 3] for i in range(0, len(body), 3)]


def _trigrams(body: list[str], rng: Random) -> list[str]:
    chunks = _chunks(body)
    return [word for chunk in rng.sample(chunks, len(chunks)) for word in chunk]


def _inside_trigrams(body: list[str], rng: Random) -> list[str]:
    return [word for chunk in _chunks(body) for word in rng.sample(chunk, len(chunk))]


_ORDERS: tuple[Callable[[list[str], Random], list[str]] | str, ...] = (
    _words,
    _trigrams,
    _inside_trigrams,
    "NJC",
    "DPQBVGXIRTWO",
)
"""Orders of words; a string stands for the letters whose words change places."""


def _shuffle_letters(parsed: Parsed, letters: str, caption: str, rng: Random) -> str:
    """The words with these letters change places among themselves."""
    places = [i for i, token in enumerate(parsed.tokens) if token.letter in letters]
    texts = [parsed.tokens[i].text if parsed.tokens[i].gap else parsed.tokens[i].lower for i in places]
    rng.shuffle(texts)
    return put(parsed, dict(zip(places, texts)), caption)


def _is_list(parsed: Parsed) -> bool:
    """Whether its things can trade places and nothing else is said: "a, b and c", "a next to b"."""
    neighbours = list(pairwise(parsed.phrases))
    return bool(neighbours) and all(equivalent(parsed, a, b, lexicon()) for a, b in neighbours)


def _things(parsed: Parsed) -> list[list[str]]:
    """The words of each noun phrase, articles apart, in no order."""
    spans = [parsed.tokens[phrase.start : phrase.stop] for phrase in parsed.phrases]
    return sorted(sorted(token.lower for token in span if token.letter != "D") for span in spans)


def _rotate_phrases(parsed: Parsed, caption: str, rng: Random) -> str:
    """Every noun phrase stands where another stood."""
    words, phrases = as_words(parsed.tokens), parsed.phrases
    shift = rng.randrange(1, len(phrases))
    order, end = [], 0
    for phrase, other in zip(phrases, phrases[shift:] + phrases[:shift]):
        order += words[end : phrase.start] + words[other.start : other.stop]
        end = phrase.stop
    return write(order + words[end:], caption)


def _says_the_same(text: str, parsed: Parsed, caption: str) -> bool:
    """Whether nothing moved, things of a list traded places, or the end went to the front: "in a park a dog runs"."""
    ours, theirs = _plain(text), _plain(caption)
    if ours == theirs or (_is_list(parsed) and _things(parse(text)) == _things(parsed)):
        return True
    cuts = [theirs.find(f" {token.lower} ") for token in parsed.tokens if token.letter in "IW"]
    return any(cut > 0 and ours == f"{theirs[cut + 1 :]} {theirs[:cut]}" for cut in cuts)
