"""Nouns that the packaged lists do not know, placed in them by WordNet where it is installed.

WordNet says that a bonnet is a hat; the lists say that no hat is a helmet: so no bonnet is one. WordNet's own
co-hyponyms are not offered: most can be the same thing by another name ("a room" is "an enclosure"; docs/log.md).

Reads the plain database files (Debian: wordnet-base); $CLIPKIT_WORDNET names another folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from clipkit.negatives.english import put
from clipkit.negatives.lexicon import Noun, lexicon, regular_plural
from clipkit.negatives.rewrites import OFFERS, Rewrites, draw, ordered
from clipkit.negatives.swaps import noun_for_slot
from clipkit.negatives.tagging import Phrase, parse
from clipkit.registry import rule

FOLDER = "CLIPKIT_WORDNET"
"""Environment variable with the folder of the database."""
FILES = ("data.noun", "index.noun", "cntlist.rev")
USUAL = ("/usr/share/wordnet", "/usr/local/share/wordnet", "/usr/local/WordNet-3.0/dict")
USES, SURE = 5, 0.75
"""A word of several senses is taken for its first if WordNet's corpora use that so often, and in that share of uses."""
STEPS = 3
"""How far above a noun a listed one is looked for: further up are classes that hold nearly anything."""
BEINGS = {"05": "animal", "18": "person"}
"""Domain of the lists by WordNet's lexicographer file; what is in no such file is no being there."""
BODY = "08", ("limbs", "head parts", "trunk parts", "hair")
"""The file of parts of bodies, and the lists' groups of them."""


class Synset(NamedTuple):
    """Words of one meaning; `above` are the offsets of what such a thing is."""

    file: str
    words: tuple[str, ...]
    above: tuple[str, ...]


class WordNet:
    """The nouns of a database folder. A synset is named by its offset in data.noun."""

    def __init__(self, folder: Path):
        self.mark = f"{(folder / 'data.noun').stat().st_size}"
        self._data = (folder / "data.noun").read_bytes()
        self._index = (folder / "index.noun").read_text("ascii", errors="replace")
        self._uses = (folder / "cntlist.rev").read_text("ascii", errors="replace")

    @cached_property
    def senses(self) -> dict[str, tuple[str, ...]]:
        """Lemma (lower case) → its synsets, the commonest first."""
        found = {}
        for line in self._index.splitlines():
            if not line.startswith(" "):
                lemma, _, count, pointers, *rest = line.split()
                found[lemma.replace("_", " ")] = tuple(rest[int(pointers) + 2 :][: int(count)])
        return found

    @cached_property
    def uses(self) -> dict[str, dict[int, int]]:
        """Lemma → how often WordNet's corpora use it as a noun, by number of the sense, from 1."""
        found: dict[str, dict[int, int]] = {}
        for line in self._uses.splitlines():
            key, number, uses = line.split()
            lemma, _, sense = key.partition("%")
            if sense.startswith("1:"):
                found.setdefault(lemma.replace("_", " "), {})[int(number)] = int(uses)
        return found

    @lru_cache(maxsize=65536)  # noqa: B019 (one WordNet lives as long as the process)
    def synset(self, offset: str) -> Synset:
        """What stands at an offset."""
        start = int(offset)
        fields = self._data[start : self._data.index(b"|", start)].decode("ascii").split()
        words = int(fields[3], 16)
        rest = fields[5 + 2 * words :]
        above = tuple(target for kind, target in zip(rest[::4], rest[1::4]) if kind == "@")
        return Synset(fields[1], tuple(fields[4 : 4 + 2 * words : 2]), above)

    def meant(self, lemma: str) -> str:
        """The synset that a word means nearly always; "" where there is none."""
        senses, uses = self.senses.get(lemma, ()), self.uses.get(lemma, {})
        first = uses.get(1, 0)
        sure = len(senses) == 1 or (first >= USES and first >= SURE * sum(uses.values()))
        return senses[0] if senses and sure else ""

    def kin(self, lemma: str) -> set[str]:
        """The word, its synonyms in any sense, and all that stands above any of them."""
        found, todo = {lemma}, [*self.senses.get(lemma, ())]
        while todo:
            synset = self.synset(todo.pop())
            found |= {word.lower().replace("_", " ") for word in synset.words}
            todo += synset.above
        return found

    @cached_property
    def listed(self) -> dict[str, Noun]:
        """Synset → the packaged noun that means it."""
        found: dict[str, Noun] = {}
        for readings in lexicon().nouns.forms.values():
            for noun, _ in readings:
                meant = self.meant(noun.lemma) if noun.member else ""
                if meant and _of_one_sort(self.synset(meant).file, noun):
                    found.setdefault(meant, noun)
        return found

    def places(self, lemma: str) -> list[Noun]:
        """The nearest packaged nouns that a word is a kind of, or another word for."""
        level = [meant] if (meant := self.meant(lemma)) else []
        for _ in range(STEPS + 1):
            if found := [self.listed[offset] for offset in level if offset in self.listed]:
                return found
            level = [above for offset in level for above in self.synset(offset).above]
        return []

    def offers(self, lemma: str) -> Iterator[Noun]:
        """Packaged nouns that cannot hold of the thing that an unlisted lemma names."""
        kin, places = self.kin(lemma), self.places(lemma)
        for noun in dict.fromkeys(offer for place in places for offer in lexicon().nouns.offers(place)):
            excluded = all(noun.group == place.group for place in places)
            named = lemma in noun.lemma.split()  # "a cart" may be a golf cart
            if excluded and not named and noun.lemma not in kin and lemma not in self.kin(noun.lemma):
                yield noun


def installed() -> WordNet | None:
    """The WordNet of this machine, read once."""
    return _opened(os.environ.get(FOLDER, ""))


@lru_cache(maxsize=2)
def _opened(named: str) -> WordNet | None:
    for folder in map(Path, [named] if named else USUAL):
        if all((folder / name).is_file() for name in FILES):
            return WordNet(folder)
    return None


def _of_one_sort(file: str, noun: Noun) -> bool:
    """Whether a synset of this file and a listed noun can be one thing: a hood is worn, and a hoodlum."""
    body, groups = BODY
    return BEINGS.get(file, "") == (noun.domain if noun.animate else "") and (file == body) == (noun.group in groups)


@rule()
def replace_nouns_wordnet(caption: str, rng: Random) -> Rewrites:
    """One noun that replace_nouns does not know becomes a listed one that excludes what WordNet says it is."""
    wordnet = installed()
    if wordnet is None:
        return Rewrites(reason="no WordNet here (Debian: wordnet-base)")
    lex, parsed = lexicon(), parse(caption)
    said = set[str]().union(*(lex.nouns.kin(phrase.lemma) for phrase in parsed.phrases))
    texts = []
    for phrase in parsed.phrases:
        known = phrase.sense is not None or phrase.head in lex.nouns.fixed or phrase.head in lex.nouns.forms
        if known or parsed.is_compound(phrase) or parsed.is_negated(phrase) or parsed.after(phrase) == "of":
            continue
        lemma = _singular(phrase.head, wordnet) if phrase.plural else phrase.head
        if phrase.plural == (lemma == phrase.head):
            continue  # a plural that WordNet does not know
        offers = [noun for noun in wordnet.offers(lemma) if noun.lemma not in said | lex.genders.keys()]
        forms = [form for noun in draw(rng, offers) if (form := _form(noun, phrase))]
        texts += [put(parsed, {phrase.stop - 1: form}, caption) for form in forms[:OFFERS]]
    return ordered(rng, texts, reason="no noun beyond the lists that WordNet places in them")


def _form(noun: Noun, phrase: Phrase) -> str:
    """`noun` as the head of a phrase whose own head the lists do not know; "" where it does not fit."""
    bare = not phrase.plural and not phrase.determiner and not phrase.number
    return "" if bare and noun.count != "mass" else noun_for_slot(noun, phrase)


def _singular(plural: str, wordnet: WordNet) -> str:
    """The lemma whose regular plural it is, if WordNet has it."""
    for lemma in (plural[:-1], plural[:-2], plural[:-3] + "y"):
        if lemma in wordnet.senses and regular_plural(lemma) == plural:
            return lemma
    return plural
