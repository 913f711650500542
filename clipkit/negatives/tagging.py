"""A caption as words, phrases and attributes: TextBlob's pattern tagger (its lexicon is in the package, nothing is
downloaded), mended for captions, and a chunker over one letter a word.

    A   small red circle is to the left of   a   big square .
    D   J     J   N      B  I                D   J   N      .

Letters: D determiner, P possessive pronoun, C number, Q quantity ("group of"), J attribute, N noun, S possessive 's,
B form of be, V other finite verb, G -ing form, X participle, I preposition or relation (one token, however many
words), R adverb, T to, W relative pronoun, O other pronoun, & conjunction, comma, full stop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from clipkit.negatives.lexicon import Lexicon, Noun, lexicon

_TOKEN = re.compile(r"['’]s\b|\w+(?:[-.]\w+)*(?:['’](?!s\b)\w+)*|[^\w\s]")
_PHRASE = re.compile(r"(?:[DP]?C?J*Q)?(?P<det>[DP]?)(?P<number>C?)(?P<modifiers>(?:R*J(?:[&,]{0,2}R*J)*)?)N+")
_PREDICATE = re.compile(r"B(?:R|O)*J")

_BY_TAG = {
    "DT": "D", "PRP$": "P", "CD": "C", "JJ": "J", "JJR": "J", "JJS": "J", "VBZ": "V", "VBP": "V", "VB": "V", "VBD": "V",
    "MD": "V", "VBG": "G", "VBN": "X", "IN": "I", "TO": "T", "RP": "I", "RB": "R", "RBR": "R", "CC": "&", "WDT": "W",
    "WP": "W", "WRB": "W", "PRP": "O", "EX": "O", "POS": "S",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Token:
    """One word, sign, or phrase that is never cut open. `lower` is its lower-case form, `gap` the space before it."""

    text: str
    lower: str
    letter: str
    gap: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """A noun phrase: tokens start to stop (exclusive), the head at stop - 1.

    `modifiers` are the positions of its attributes, the number included; `determiner` and `number` are "" when absent.
    """

    start: int
    stop: int
    modifiers: tuple[int, ...]
    determiner: str
    number: str
    head: str
    plural: bool
    sense: Noun | None

    @property
    def lemma(self) -> str:
        """Lemma of the head, its written form when unknown."""
        return self.sense.lemma if self.sense else self.head


@dataclass(frozen=True)
class Parsed:
    """A caption's tokens, noun phrases and predicates: (attribute, the phrase it is said of) by position."""

    tokens: tuple[Token, ...]
    phrases: tuple[Phrase, ...]
    predicates: tuple[tuple[int, int], ...]

    @cached_property
    def letters(self) -> str:
        """One letter a token."""
        return "".join(token.letter for token in self.tokens)

    def before(self, phrase: Phrase) -> str:
        """The token before a phrase, "" at the start."""
        return self.tokens[phrase.start - 1].lower if phrase.start else ""

    def after(self, phrase: Phrase) -> str:
        """The token after a phrase, "" at the end."""
        return self.tokens[phrase.stop].lower if phrase.stop < len(self.tokens) else ""

    def attributes(self, phrase: Phrase) -> set[str]:
        """The words of a phrase's attributes."""
        return {self.tokens[i].lower for i in phrase.modifiers}

    def is_compound(self, phrase: Phrase) -> bool:
        """Whether another noun stands before the head ("cliff face"): the head alone then means something else."""
        return phrase.stop - phrase.start > 1 and self.tokens[phrase.stop - 2].letter == "N"

    def is_negated(self, phrase: Phrase) -> bool:
        """Whether a phrase says what is absent: another thing in its place would be absent just as well."""
        absent = ("without", "no", "not", "except")
        return phrase.determiner in ("no", "any", "neither") or self.before(phrase) in absent


@lru_cache(maxsize=4096)
def parse(caption: str) -> Parsed:
    """Tokens, noun phrases and predicates of a caption. Cached: every kind of negative reads the same one."""
    lex = lexicon()
    spans = [match.span() for match in _TOKEN.finditer(caption)]
    words = [caption[a:b].lower().replace("’", "'") for a, b in spans]
    tags = _tags(words)
    pieces = _merge(words, lex)
    letters = _letters([(" ".join(words[a:b]), tags[b - 1], letter) for a, b, letter in pieces], lex)
    tokens, end = [], 0
    for (a, b, _), letter in zip(pieces, letters):
        text = caption[spans[a][0] : spans[b - 1][1]]
        tokens.append(Token(text, " ".join(words[a:b]), letter, caption[end : spans[a][0]]))
        end = spans[b - 1][1]
    phrases = tuple(_phrases(tokens, lex))
    return Parsed(tuple(tokens), phrases, tuple(_predicates(tokens, phrases)))


def _tags(words: list[str]) -> list[str]:
    from textblob.en import parser

    return [tag for _, tag in parser.find_tags(words)]


def _merge(words: list[str], lex: Lexicon) -> list[tuple[int, int, str]]:
    """(start, stop, letter) of single words (letter "") and of known phrases, the longest at each place."""
    pieces, i = [], 0
    while i < len(words):
        stop, letter = i + 1, ""
        for parts, phrase_letter in lex.phrases.get(words[i], ()):
            if tuple(words[i : i + len(parts)]) == parts:
                stop, letter = i + len(parts), phrase_letter
                break
        pieces.append((i, stop, letter))
        i = stop
    return pieces


def _letters(pieces: list[tuple[str, str, str]], lex: Lexicon) -> str:
    """One letter for each (word, tag, known letter), left to right, nouns before verbs looked ahead for."""
    letters = ""
    for i, (word, tag, known) in enumerate(pieces):
        following, next_tag, next_known = pieces[i + 1] if i + 1 < len(pieces) else ("", ".", "")
        before_noun = next_known == "N" or (
            not next_known
            and (following in lex.nouns.forms or next_tag[:2] in ("NN", "JJ"))
            and following not in lex.letters
        )
        before = pieces[i - 1][0] if i else ""
        letters += known or _letter(word, tag, letters, before, before_noun, following, lex)
    return letters


def _letter(word: str, tag: str, letters: str, before: str, before_noun: bool, following: str, lex: Lexicon) -> str:
    previous = letters[-1:]
    if word == "'s":
        return "S" if previous == "N" else "B"
    if word == "her":
        return "P" if before_noun else "O"
    if word in ("one", "that") and before_noun and previous not in ("N", "G"):
        return "C" if word == "one" else "D"
    if word in lex.letters:
        return lex.letters[word]
    if word.isdigit():
        return "C"
    if tag in ("IN", "TO") and word not in lex.nouns.forms and word not in lex.attributes:
        return "I"
    if word.endswith("ing") and not before_noun and word not in lex.nouns.forms and word not in lex.nouns.fixed:
        return "N" if previous in tuple("DPC") else "G"
    if word in lex.attributes or tag in ("JJ", "JJR", "JJS"):
        return _attribute_letter(word, tag, previous, before_noun, following, lex)
    if word.endswith("ing") and word not in lex.nouns.forms and word not in lex.nouns.fixed:
        return "J" if previous in tuple("DPCJ") else "G"
    if word in lex.nouns.forms or tag.startswith("NN"):
        return _noun_letter(word, tag, previous, before, following, lex)
    if tag == "VBN" and previous in tuple("DPCJ") and before_noun:
        return "J"
    letter = _BY_TAG.get(tag, "N" if tag.startswith("NN") else "O")
    owned = previous in tuple("PS") or before in ("a", "an", "the")
    return "N" if letter == "V" and owned else letter  # "on their walk"


def _attribute_letter(word: str, tag: str, previous: str, before_noun: bool, following: str, lex: Lexicon) -> str:
    """An attribute, or the same word as a noun ("a male", "a rock") or a verb ("to clean")."""
    if tag.startswith("VB") and tag != "VBN" and previous in tuple("NOT") and word in lex.verbs.forms:
        return "V"
    is_noun = word in lex.nouns.forms or tag.startswith("NN") or word in lex.noun_attributes
    if before_noun or following in (",", "and", "&"):
        return "J"
    if not is_noun:
        return "N" if previous in tuple("DPCJ") and word not in lex.attributes else "J"
    return "N" if previous in tuple("DPCJQSI") and "colours" not in lex.attributes.groups(word) else "J"


def _noun_letter(word: str, tag: str, previous: str, before: str, following: str, lex: Lexicon) -> str:
    """A noun, or a verb that the tagger takes for one: "a dog jumps", "two dogs race"."""
    if previous in tuple("DPCJQS"):
        return "N"
    base, form = lex.verbs.forms.get(word, ("", ""))
    if previous == "&" and form == "third" and lex.letters.get(following) in ("D", "P", "I"):
        return "V"
    if not base or previous not in tuple("NOWR"):
        return "N" if word in lex.nouns.forms or tag.startswith("NN") else _BY_TAG.get(tag, "N")
    takes_more = (
        following in lex.letters or following in ("", "her") or following.endswith("ing") or following in lex.phrases
    )
    if form == "gerund":
        return "N"
    if word not in lex.nouns.forms and word not in lex.nouns.fixed:
        return "V" if takes_more or form == "third" else "N"
    # Nouns as well ("waves", "a race"): verbs after somebody who can do it, or before what it is done to.
    subject = any(noun.animate and plural == (form == "base") for noun, plural in lex.nouns.readings(before))
    done_to = lex.letters.get(following) in ("D", "P") or following == "her"
    return "V" if takes_more and (subject or done_to or (form == "base" and tag.startswith("VB"))) else "N"


def _phrases(tokens: list[Token], lex: Lexicon) -> list[Phrase]:
    letters = "".join(token.letter for token in tokens)
    found = []
    for match in _PHRASE.finditer(letters):
        head = tokens[match.end() - 1].lower
        determiner = tokens[match.start("det")].lower if match["det"] else ""
        number = tokens[match.start("number")].lower if match["number"] else ""
        modifiers = [i for i in range(match.start("number"), match.end()) if letters[i] == "J"]
        if number in lex.attributes:
            modifiers.insert(0, match.start("number"))
        sense, plural = _sense(head, determiner, number, lex)
        if letters[match.start() - 1 : match.start()] == "S":
            determiner = "'s"
        found.append(Phrase(match.start(), match.end(), tuple(modifiers), determiner, number, head, plural, sense))
    return found


def _sense(head: str, determiner: str, number: str, lex: Lexicon) -> tuple[Noun | None, bool]:
    """The sense of a head noun that its determiner allows, and whether it is plural."""
    readings = lex.nouns.readings(head)
    if not readings:
        return None, head.endswith("s") and not head.endswith(("ss", "us", "is"))
    if len(readings) > 1:
        many = (bool(number) and number != "one") or determiner in ("these", "those", "some", "both")
        wanted = "count" if determiner in ("a", "an", "the", "his", "her", "its", "another") or number else "mass"
        readings = sorted(readings, key=lambda r: (r[1] != many, r[0].count != wanted))
    return readings[0]


def _predicates(tokens: list[Token], phrases: tuple[Phrase, ...]) -> list[tuple[int, int]]:
    """Attributes said with a form of be right after a phrase: "the dog is very small"."""
    letters = "".join(token.letter for token in tokens)
    stops = {phrase.stop: i for i, phrase in enumerate(phrases)}
    found = []
    for match in _PREDICATE.finditer(letters):
        if match.start() in stops and letters[match.end() : match.end() + 1] not in ("N", "J"):
            found.append((match.end() - 1, stops[match.start()]))
    return found
