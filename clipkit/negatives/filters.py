"""Which candidates become negatives: checks that hold for any source, rule or model; each drop has a reason.

A negative must say something else than its caption (and than the other captions of the picture), in the way its kind
promises, and read like a caption.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import pairwise

from clipkit.negatives.english import article
from clipkit.negatives.lexicon import lexicon

MIN_WORDS, MAX_WORDS = 2, 60
"""Shortest and longest negative; 60 words always fit CLIP's 77 tokens for plain captions."""
LONGEST = 150
"""Longest of the kinds that are to be long: two sentences and more; towers of CLIP's length cut them."""
LONGER = 2.0
"""A negative this many times as long as its caption tells itself apart by its length."""

PROFANE = frozenset(
    re.findall(
        r"\w+",
        "ass asses asshole bastard bastards bitch bitches bollocks crap cunt damn dick dickhead fuck fucked fucking "
        "fucker goddamn motherfucker piss pissed prick shit shitty slut sluts twat wanker whore whores",
    )
)
"""Words that neither come in nor go."""

_WORD = re.compile(r"'s\b|\w+(?:-\w+)*(?:'(?!s\b)\w+)*")


Pair = tuple[str, str]


@dataclass(frozen=True)
class Usage:
    """Which words stand side by side in captions; `mark` names the set."""

    pairs: frozenset[Pair]
    mark: str


@dataclass(frozen=True)
class Case:
    """A candidate beside its caption, its kind, the other captions of the picture, and usage where it counts."""

    text: str
    caption: str
    kind: str
    siblings: tuple[str, ...] = ()
    usage: Usage | None = None

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The candidate's words, lower-case."""
        return _words(self.text)

    @cached_property
    def original(self) -> tuple[str, ...]:
        """The caption's words, lower-case."""
        return _words(self.caption)

    @cached_property
    def same_words(self) -> bool:
        """Whether both have the same bag of words, synonyms, number and a/an apart."""
        return Counter(map(concept, self.words)) == Counter(map(concept, self.original))


def _identical(case: Case) -> bool:
    return case.words == case.original


def _another_caption(case: Case) -> bool:
    return any(case.words == _words(sibling) for sibling in case.siblings)


def _too_short(case: Case) -> bool:
    return len(case.words) < MIN_WORDS and not case.kind.endswith("tags")


def _too_long(case: Case) -> bool:
    if case.kind.startswith("long"):  # meant to be
        return len(case.words) > LONGEST
    return len(case.words) > min(MAX_WORDS, LONGER * len(case.original) + 2)


def _words_kept(case: Case) -> bool:
    return case.kind.startswith("replace") and case.same_words


def _words_changed(case: Case) -> bool:
    return case.kind.startswith(("swap", "reshuffle", "permute")) and not case.same_words


def _words_lost(case: Case) -> bool:
    return case.kind.startswith("add") and not Counter(map(concept, case.original)) <= Counter(map(concept, case.words))


def _stutter(case: Case) -> bool:
    if case.kind.startswith("reshuffle"):
        return False
    return _stutters(case.words) > _stutters(case.original)


def _wrong_article(case: Case) -> bool:
    small = lexicon().small_words
    known = set(pairwise(case.original))
    pairs = pairwise(case.words)
    return any(a in ("a", "an") and b not in small and (a, b) not in known and article(b) != a for a, b in pairs)


def _said_elsewhere(case: Case) -> bool:
    """Another caption that speaks of the same things has the new word, for an old one in its place or added.

    Of a relation it has to name the things in the same order: "a heart below a star" does not put the star below.
    """
    if not case.kind.startswith(("replace", "add")):
        return False
    ours, theirs = content(case.text), content(case.caption)
    new, old, kept = ours - theirs, theirs - ours, ours & theirs

    def says_so(sibling: str) -> bool:
        said = content(sibling)
        same = kept & said
        if not (new & said and same) or old & said:
            return False
        return case.kind != "replace_relations" or _order(case.text, same) == _order(sibling, same)

    return any(map(says_so, case.siblings))


def _order(text: str, concepts: frozenset[str]) -> list[str]:
    return [name for name in map(concept, _words(text)) if name in concepts]


def _profane(case: Case) -> bool:
    """Swear words come in or go: a negative changes what is said, not how."""
    return bool(PROFANE & (set(case.words) ^ set(case.original)))


def _unusual(case: Case) -> bool:
    """Two neighbouring words that captions do not hold: such a negative can be told without its picture."""
    if case.usage is None or case.kind.startswith("reshuffle"):
        return False
    return not set(pairwise(case.words)) <= case.usage.pairs | set(pairwise(case.original))


CHECKS: dict[str, Callable[[Case], bool]] = {
    "identical": _identical,
    "another caption of the picture": _another_caption,
    "too short": _too_short,
    "too long": _too_long,
    "only synonyms replaced": _words_kept,
    "words changed": _words_changed,
    "words lost": _words_lost,
    "repeated word": _stutter,
    "wrong article": _wrong_article,
    "another caption says so": _said_elsewhere,
    "profanity changed": _profane,
    "unusual neighbours": _unusual,
}
"""Reason → whether a case is dropped for it, in the order they are asked."""


def usage_of(captions: Iterable[str], at_least: int) -> Usage:
    """The pairs of neighbouring words that at least so many captions hold."""
    counts = Counter(pair for caption in captions for pair in set(pairwise(_words(caption))))
    pairs = frozenset(pair for pair, count in counts.items() if count >= at_least)
    return Usage(pairs, blake2b(repr(sorted(pairs)).encode(), digest_size=8).hexdigest())


def reason_to_drop(case: Case) -> str:
    """The first reason why a candidate is no negative; "" when it is one."""
    return next((reason for reason, drops in CHECKS.items() if drops(case)), "")


def keep(
    candidates: Iterable[str],
    caption: str,
    kind: str,
    *,
    limit: int,
    siblings: Sequence[str] = (),
    usage: Usage | None = None,
    taken: set[str],
    drops: Counter[str],
) -> list[str]:
    """The first `limit` candidates that pass every check; `taken` (texts already kept) and `drops` are added to."""
    kept: list[str] = []
    for text in candidates:
        if len(kept) == limit:
            break
        case = Case(text, caption, kind, tuple(siblings), usage)
        mark = mark_of(text)
        reason = "duplicate" if mark in taken else reason_to_drop(case)
        if reason:
            drops[reason] += 1
        else:
            taken.add(mark)
            kept.append(text)
    return kept


def mark_of(text: str) -> str:
    """Equal for texts of the same words in the same order."""
    return " ".join(_words(text))


@lru_cache(maxsize=4096)
def content(caption: str) -> frozenset[str]:
    """The concepts of a caption's words, small words left out."""
    small = lexicon().small_words
    return frozenset(concept(word) for word in _words(caption) if word not in small)


@lru_cache(maxsize=65536)
def concept(word: str) -> str:
    """One name for a word, its synonyms and its plural."""
    lex = lexicon()
    for noun, _ in lex.nouns.readings(word):
        return f"noun {noun.member}" if noun.member else noun.lemma
    for value in lex.attributes.by_name.get(word, ()):
        return f"attribute {value.member}"
    if word == "an":
        return "a"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _stutters(words: tuple[str, ...]) -> int:
    return sum(a == b for a, b in pairwise(words))
