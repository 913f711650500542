"""Kinds that concern who does what, how many there are and what is not so; and concepts permuted all at once.

Without a parser of dependencies only plain patterns are touched: "X verb-ing Y", "X verbs and Y verbs", "X is ...".
"""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from random import Random

from clipkit.negatives.english import put
from clipkit.negatives.lexicon import Lexicon, lexicon
from clipkit.negatives.rewrites import OFFERS, Rewrites, draw, exchange, exchange_phrases, ordered
from clipkit.negatives.swaps import (
    animate,
    equivalent,
    joins_things,
    may_move,
    may_trade,
    noun_for_slot,
    owned_attributes,
)
from clipkit.negatives.tagging import Parsed, Phrase, parse
from clipkit.registry import rule

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MOST = 6
"""Largest number offered; captions seldom count further."""
_DIGITS = tuple(map(str, range(1, 11)))
_BE = ("is", "are", "was", "were")
_DENIALS = frozenset(("not", "no", "without", "never", "n't", "isn't", "aren't"))
_DENIALS |= {"nobody", "none", "nothing", "neither", "nor", "nowhere"}
_NO_PLACES = ("with", "without", "up", "down", "into", "out of", "onto", "off", "before", "after", "by")
_VERB = re.compile("B?R?[VG]I?$")


@rule()
def swap_roles(caption: str, rng: Random) -> Rewrites:
    """Who does it and whom it is done to change places: "a dog chasing a cat" → "a cat chasing a dog".

    Only living things, with nothing but the verb and a preposition between them.
    """
    lex, parsed = lexicon(), parse(caption)
    texts = []
    for a, b in pairwise(parsed.phrases):
        if not (animate(a) and animate(b) and _VERB.match(parsed.letters[a.stop : b.start])):
            continue
        if (a.start and parsed.letters[a.start - 1] not in ",W") or parsed.tokens[b.start - 1].lower.isdigit():
            continue
        cut = parsed.after(b) in ("of", "'s") or parsed.letters[b.stop : b.stop + 1] in ("J", "N")
        if cut or lex.nouns.related(a.lemma, b.lemma) or equivalent(parsed, a, b, lex):
            continue
        into_a, into_b = noun_for_slot(b, a), noun_for_slot(a, b)
        if may_move(parsed, a, b):
            texts.append(exchange_phrases(parsed, a, b, caption))
        elif into_a and into_b and not any(p.modifiers or parsed.is_compound(p) for p in (a, b)):
            texts.append(put(parsed, {a.stop - 1: into_a, b.stop - 1: into_b}, caption))
    return ordered(rng, texts, reason="no verb between two living things")


@rule()
def swap_verb_phrases(caption: str, rng: Random) -> Rewrites:
    """Two living things exchange what they do: "a dog runs while a cat sleeps" → "a dog sleeps while a cat runs".

    NegCLIP, arXiv 2210.01936.
    """
    lex, parsed = lexicon(), parse(caption)
    letters = parsed.letters
    end = len(letters) - (letters[-1:] == ".")
    subjects = [p for p in parsed.phrases if animate(p) and letters[p.stop : p.stop + 1] in ("B", "V", "G")]
    texts = []
    for a, b in pairwise(subjects):
        ours, theirs = (a.stop, b.start - 1), (b.stop, end)
        says, does = letters[slice(*ours)], letters[slice(*theirs)]
        joined = parsed.before(b) in ("and", "while", "whilst", "as") and says
        if not joined or letters[a.start - 1 : a.start] == "&" or lex.nouns.related(a.lemma, b.lemma):
            continue
        if b is not subjects[-1] or says[0] != does[0] or a.plural != b.plural or set("POW,") & set(says + does):
            continue
        if (says[0] == "G" and set("BV") & set(says + does)) or _text(parsed, ours) == _text(parsed, theirs):
            continue
        texts.append(exchange(parsed, ours, theirs, caption))
    return ordered(rng, texts, reason="no two subjects that each do something")


@rule()
def swap_adverbs(caption: str, rng: Random) -> Rewrites:
    """Two adverbs that say how something is done change places (NegCLIP, arXiv 2210.01936); few captions hold two."""
    lex, parsed = lexicon(), parse(caption)
    places = [i for i, t in enumerate(parsed.tokens) if t.letter == "R" and t.lower.endswith("ly")]
    texts = []
    for i, j in combinations(places, 2):
        left, right = parsed.tokens[i].lower, parsed.tokens[j].lower
        between = set(parsed.letters[i + 1 : j])
        if left != right and between & set("VGNJ") and not {left, right} & (lex.letters.keys() | lex.no_manners):
            texts.append(put(parsed, {i: right, j: left}, caption))
    return ordered(rng, texts, reason="no two adverbs")


@rule()
def permute_concepts(caption: str, rng: Random) -> Rewrites:
    """All words of one sort change places among themselves: colours, sizes, places, living things, clothes.

    After the concept permutation of Rösch et al. (InpaintCOCO).
    """
    lex, parsed = lexicon(), parse(caption)
    texts = []
    owned = owned_attributes(parsed, lex)
    for group in ("colours", "sizes"):
        mine = [(i, p) for i, p in owned if group in lex.attributes.groups(parsed.tokens[i].lower)]
        if len(mine) > 1 and all(a is not b and may_trade(parsed, i, a, j, b, lex) for (i, a), (j, b) in _pairs(mine)):
            texts.append(_turned(parsed, [i for i, _ in mine], rng, caption))
    places = [i for i, t in enumerate(parsed.tokens) if t.lower in lex.relations and t.letter == "I"]
    places = [i for i in places if joins_things(parsed, i, lex) and not _is_worn(parsed, i)]
    places = [i for i in places if parsed.tokens[i].lower not in _NO_PLACES]
    if len({parsed.tokens[i].lower for i in places}) == len(places) > 1:
        texts.append(_turned(parsed, places, rng, caption))
    texts += _turned_things(parsed, rng, caption, lex)
    return ordered(rng, texts, reason="no two words of one sort whose exchange changes the meaning")


@rule()
def replace_numbers(caption: str, rng: Random) -> Rewrites:
    """A number of things becomes another: "two dogs" → "four dogs"; "one" takes its noun and "a" along where it can."""
    lex, parsed = lexicon(), parse(caption)
    texts = []
    for phrase in parsed.phrases:
        words = next((names for names in (NUMBERS, _DIGITS) if phrase.number in names), None)
        if words is None or not phrase.plural or phrase.head in lex.nouns.fixed or parsed.after(phrase) == "of":
            continue
        place = next(i for i in range(phrase.start, phrase.stop) if parsed.letters[i] == "C")
        others = [word for word in words[1:MOST] if word != phrase.number]
        texts += [put(parsed, {place: word}, caption) for word in draw(rng, others)[:OFFERS]]
    return ordered(rng, texts, reason="no number of things")


@rule()
def negate(caption: str, rng: Random) -> Rewrites:
    """What is said is denied: "is not", "does not", "not running", "there is no"; "without" where nothing is done."""
    lex, parsed = lexicon(), parse(caption)
    if _DENIALS & {token.lower for token in parsed.tokens}:
        return Rewrites(reason="denies something already")
    verbs, others = [], []
    for i in range(len(parsed.tokens)):
        if changes := _denied(parsed, i, lex):
            verbs.append(put(parsed, changes, caption))
        elif parsed.tokens[i].lower == "with" and joins_things(parsed, i, lex):
            others.append(put(parsed, {i: "without"}, caption))
    return ordered(rng, verbs[:1], others, reason="nothing that could be denied")


def _denied(parsed: Parsed, i: int, lex: Lexicon) -> dict[int, str]:
    """The changes that deny the verb at i; none where it is no plain verb behind its subject."""
    token, letters = parsed.tokens[i], parsed.letters
    if token.lower in _BE and token.letter == "B":
        there = i and parsed.tokens[i - 1].lower == "there"
        if there and letters[i + 1 : i + 2] == "D" and parsed.tokens[i + 1].lower in ("a", "an"):
            return {i + 1: "no"}
        return {i: f"{token.lower} not"}
    subject = next((p for p in parsed.phrases if p.stop == i), None)
    if subject is None or ("&" in letters[i:] and "V" in letters[i + 1 :]):
        return {}
    base, form = lex.verbs.forms.get(token.lower, ("", ""))
    if token.letter == "V" and form == "third" and not subject.plural:
        return {i: f"does not {base}"}
    if token.letter == "V" and form == "base" and subject.plural:
        return {i: f"do not {base}"}
    if token.letter == "G" and not set("BV") & set(letters[:i]):
        return {i: f"not {token.lower}"}
    return {}


def _pairs(items: list[tuple[int, Phrase]]) -> list[tuple[tuple[int, Phrase], tuple[int, Phrase]]]:
    return list(combinations(items, 2))


def _turned(parsed: Parsed, places: list[int], rng: Random, caption: str) -> str:
    """The words at these places, each where another stood."""
    shift = rng.randrange(1, len(places))
    names = [parsed.tokens[i].lower for i in places]
    return put(parsed, dict(zip(places, names[shift:] + names[:shift])), caption)


def _turned_things(parsed: Parsed, rng: Random, caption: str, lex: Lexicon) -> list[str]:
    """All living things, or all that is worn, each where another stood."""
    texts = []
    for domains in (("person", "animal"), ("worn",)):
        things = [p for p in parsed.phrases if p.sense and p.sense.domain in domains and p.sense.group]
        odd = any(parsed.is_compound(p) or "of" in (parsed.before(p), parsed.after(p)) for p in things)
        if len(things) < 2 or odd or not all(_differ(parsed, a, b, lex) for a, b in combinations(things, 2)):
            continue
        shift = rng.randrange(1, len(things))
        forms = [noun_for_slot(b, a) for a, b in zip(things, things[shift:] + things[:shift])]
        if all(forms):
            texts.append(put(parsed, {p.stop - 1: form for p, form in zip(things, forms)}, caption))
    return texts


def _differ(parsed: Parsed, a: Phrase, b: Phrase, lex: Lexicon) -> bool:
    """Whether exchanging two heads changes the meaning, and says nothing of a person that is said of animals only."""
    ours, theirs = parsed.attributes(a), parsed.attributes(b)
    same = equivalent(parsed, a, b, lex) and not (ours and theirs and ours != theirs)
    mixed = {x.sense.domain for x in (a, b) if x.sense} == {"person", "animal"} and ours | theirs
    return not (same or mixed or lex.nouns.related(a.lemma, b.lemma))


def _is_worn(parsed: Parsed, i: int) -> bool:
    """Whether what follows the token at i is worn: "in a hat" says no place."""
    return any(p.start == i + 1 and p.sense and p.sense.domain == "worn" for p in parsed.phrases)


def _text(parsed: Parsed, span: tuple[int, int]) -> list[str]:
    return [token.lower for token in parsed.tokens[span[0] : span[1]]]
