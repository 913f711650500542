"""Nouns that the packaged lists do not know, replaced by WordNet's co-hyponyms where WordNet is installed.

Reads the plain database files (Debian: wordnet-base); $CLIPKIT_WORDNET names another folder. A word's first sense is
taken for the one that is meant: rougher than the packaged lists (docs/log.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random

from clipkit.negatives.english import put
from clipkit.negatives.lexicon import lexicon, regular_plural
from clipkit.negatives.rewrites import OFFERS, Rewrites, ordered
from clipkit.negatives.tagging import parse
from clipkit.registry import rule

FOLDER = "CLIPKIT_WORDNET"
"""Environment variable with the folder of index.noun and data.noun."""
USUAL = ("/usr/share/wordnet", "/usr/local/share/wordnet", "/usr/local/WordNet-3.0/dict")
VISIBLE = {"05", "06", "13", "17", "20"}
"""Lexicographer files of what a picture can show: animals, artefacts, food, natural objects, plants."""


class WordNet:
    """The nouns of a database folder. A synset is named by its offset in data.noun."""

    def __init__(self, folder: Path):
        self.mark = f"{(folder / 'data.noun').stat().st_size}"
        self._data = (folder / "data.noun").read_bytes()
        self._index = (folder / "index.noun").read_text("ascii", errors="replace")

    @cached_property
    def senses(self) -> dict[str, tuple[str, ...]]:
        """Lemma (one word, lower case) → its synsets, the commonest first, of lemmas that WordNet's corpora hold."""
        found = {}
        for line in self._index.splitlines():
            if line.startswith(" ") or "_" in line.partition(" ")[0]:
                continue
            lemma, _, _, pointers, *rest = line.split()
            count, tagged, *offsets = rest[int(pointers) :]
            if int(tagged):
                found[lemma] = tuple(offsets[: int(count)])
        return found

    @lru_cache(maxsize=65536)  # noqa: B019 (one WordNet lives as long as the process)
    def synset(self, offset: str) -> tuple[str, tuple[str, ...], dict[str, tuple[str, ...]]]:
        """(lexicographer file, words, synsets by pointer: @ above, ~ below)."""
        start = int(offset)
        fields = self._data[start : self._data.index(b"|", start)].decode("ascii").split()
        words = int(fields[3], 16)
        names = tuple(fields[4 : 4 + 2 * words : 2])
        rest = fields[5 + 2 * words :]
        pointers: dict[str, tuple[str, ...]] = {}
        for kind, target, sort in zip(rest[::4], rest[1::4], rest[2::4]):
            if sort == "n":
                pointers[kind] = (*pointers.get(kind, ()), target)
        return fields[1], names, pointers

    def kin(self, lemma: str) -> set[str]:
        """Synonyms in any sense, and what stands right above or below any of them."""
        found = {lemma}
        for offset in self.senses.get(lemma, ()):
            _, names, pointers = self.synset(offset)
            found |= set(names)
            for other in (*pointers.get("@", ()), *pointers.get("~", ())):
                found |= set(self.synset(other)[1])
        return {name.lower() for name in found}

    def sisters(self, lemma: str) -> Iterator[str]:
        """Other common words for things of the same kind as the lemma's first sense, none of its kin."""
        offsets = self.senses.get(lemma)
        if not offsets or self.synset(offsets[0])[0] not in VISIBLE:
            return
        kin = self.kin(lemma)
        for above in self.synset(offsets[0])[2].get("@", ()):
            for offset in self.synset(above)[2].get("~", ()):
                for name in self.synset(offset)[1]:
                    # A word's own first sense only: "jack" is no donkey to most.
                    meant = self.senses.get(name, ("",))[0] == offset
                    if meant and name.islower() and name.isalpha() and name[-1] != "s" and name not in kin:
                        yield name


def installed() -> WordNet | None:
    """The WordNet of this machine, read once."""
    return _opened(os.environ.get(FOLDER, ""))


@lru_cache(maxsize=2)
def _opened(named: str) -> WordNet | None:
    for folder in map(Path, [named] if named else USUAL):
        if (folder / "data.noun").is_file() and (folder / "index.noun").is_file():
            return WordNet(folder)
    return None


@rule()
def replace_nouns_wordnet(caption: str, rng: Random) -> Rewrites:
    """One noun that replace_nouns does not know becomes a WordNet co-hyponym, no synonym, hypernym or hyponym."""
    wordnet = installed()
    if wordnet is None:
        return Rewrites(reason="no WordNet here (Debian: wordnet-base)")
    lex, parsed = lexicon(), parse(caption)
    said = {token.lower for token in parsed.tokens}
    texts = []
    for phrase in parsed.phrases:
        known = phrase.sense is not None or phrase.head in lex.nouns.fixed or phrase.head in lex.nouns.forms
        if known or parsed.is_compound(phrase) or parsed.is_negated(phrase) or parsed.after(phrase) == "of":
            continue
        lemma = _singular(phrase.head, wordnet) if phrase.plural else phrase.head
        many = lemma != phrase.head
        if (phrase.plural and not many) or lemma.endswith("s"):
            continue  # a mass, a pair ("glasses"), or no plural at all ("canvas")
        offers = [name for name in wordnet.sisters(lemma) if not ({name, regular_plural(name)} & said)]
        rng.shuffle(offers)
        for name in offers[:OFFERS]:
            texts.append(put(parsed, {phrase.stop - 1: regular_plural(name) if many else name}, caption))
    return ordered(rng, texts, reason="no noun beyond the lists that WordNet has a co-hyponym for")


def _singular(plural: str, wordnet: WordNet) -> str:
    """The lemma whose regular plural it is, if WordNet has it."""
    for lemma in (plural[:-1], plural[:-2], plural[:-3] + "y"):
        if lemma in wordnet.senses and regular_plural(lemma) == plural:
            return lemma
    return plural
