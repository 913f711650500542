"""The kinds of negatives made without a model: pure functions of (caption, rng) to candidate rewrites.

DeGLA's five (arXiv 2504.16801): intra-sentence reshuffle {reshuffle, swap_nouns, swap_adjectives} and minimal
substitution {replace_adjectives, replace_nouns}; beside them swap_noun_phrases, replace_verbs and replace_relations.
Further kinds: clauses.py (who does what, negation, numbers) and additions.py (what is not there, SugarCrepe).
A candidate always differs in meaning as far as words can tell; clipkit.negatives.filters has the last word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from random import Random

from clipkit.negatives.english import as_words, put, write
from clipkit.negatives.lexicon import Lexicon, Noun, Value, lexicon
from clipkit.negatives.orders import reorder
from clipkit.negatives.rewrites import OFFERS, Rewrites, draw, exchange_phrases, ordered
from clipkit.negatives.swaps import (
    alone,
    animate,
    equivalent,
    joins_things,
    may_move,
    may_trade,
    moves,
    noun_for_slot,
    owned_attributes,
    suits,
)
from clipkit.negatives.tagging import Parsed, Phrase, parse
from clipkit.registry import rule


@rule()
def reshuffle(caption: str, rng: Random, *, draws: int = 4) -> Rewrites:
    """The same words in another order: all, trigrams, inside trigrams, noun phrases, nouns and attributes, the rest.

    The four orders of ARO (arXiv 2210.01936) are among them; `draws` different ones are tried. Final punctuation stays
    last.
    """
    if len(re.findall(r"\w+", caption)) < 3:
        return Rewrites(reason="fewer than three words")
    return ordered(rng, reorder(caption, rng, draws), reason="every order drawn says the same")


@rule()
def swap_nouns(caption: str, rng: Random) -> Rewrites:
    """Two noun phrases, or only their heads, change places; never across "and", "next to" and the like.

    Candidates in which a living thing trades places with another, or a thing with a thing, come first.
    """
    lex, parsed = lexicon(), parse(caption)
    alike, mixed = [], []
    for a, b, same in _exchangeable(parsed, lex):
        texts = alike if animate(a) == animate(b) else mixed
        if not same and may_move(parsed, a, b):
            texts.append(exchange_phrases(parsed, a, b, caption))
        into_a, into_b = noun_for_slot(b, a), noun_for_slot(a, b)
        if into_a and into_b and not parsed.is_compound(a) and not parsed.is_compound(b):
            texts.append(put(parsed, {a.stop - 1: into_a, b.stop - 1: into_b}, caption))
    return ordered(rng, alike, mixed, reason="no two things whose exchange changes the meaning")


@rule()
def swap_noun_phrases(caption: str, rng: Random) -> Rewrites:
    """Two noun phrases change places with all their adjectives (NegCLIP, arXiv 2210.01936): who has what stays.

    So the exchange shows only in where things are, or who does what to whom.
    """
    lex, parsed = lexicon(), parse(caption)
    alike, mixed = [], []
    for a, b, same in _exchangeable(parsed, lex):
        if not same and may_move(parsed, a, b):
            (alike if animate(a) == animate(b) else mixed).append(exchange_phrases(parsed, a, b, caption))
    return ordered(rng, alike, mixed, reason="no two things whose exchange changes the meaning")


@rule()
def swap_adjectives(caption: str, rng: Random) -> Rewrites:
    """Two things exchange an attribute, of one class where there is such a pair; else one attribute moves over."""
    lex, parsed = lexicon(), parse(caption)
    owned = owned_attributes(parsed, lex)
    if not owned:
        return Rewrites(reason="no attribute")
    alike, mixed = [], []
    for (i, a), (j, b) in combinations(owned, 2):
        if a is b or not may_trade(parsed, i, a, j, b, lex):
            continue
        left, right = parsed.tokens[i], parsed.tokens[j]
        text = put(parsed, {i: right.lower, j: left.lower}, caption)
        if lex.attributes.groups(left.lower) & lex.attributes.groups(right.lower):
            alike.append(text)
        elif alone(parsed, i, a) and alone(parsed, j, b) and suits(left.lower, b, lex) and suits(right.lower, a, lex):
            mixed.append(text)
    words = as_words(parsed.tokens)
    moved = (write([words[i] for i in order], caption) for order in moves(parsed, owned, lex))
    texts = alike or mixed or list(moved)
    return ordered(rng, texts, reason="no two attributes whose exchange changes the meaning")


@rule()
def replace_adjectives(caption: str, rng: Random) -> Rewrites:
    """One attribute (colour, size, age, material, mood, number, ...) becomes another value that excludes it."""
    lex, parsed = lexicon(), parse(caption)
    heads = {i: phrase for phrase in parsed.phrases for i in phrase.modifiers}
    heads |= {i: parsed.phrases[owner] for i, owner in parsed.predicates}
    said = {value.member for token in parsed.tokens for value in lex.attributes.by_name.get(token.lower, ())}
    texts = []
    for i, token in enumerate(parsed.tokens):
        following = parsed.tokens[i + 1].lower if i + 1 < len(parsed.tokens) else ""
        if token.letter not in "JC" or token.lower not in lex.attributes or following in lex.never_before:
            continue
        loose = i not in heads and not lex.attributes.groups(token.lower) & {"colours", "moods"}
        measure = token.letter == "C" and i in heads and heads[i].head in lex.nouns.fixed
        if loose or measure or (i in heads and parsed.is_negated(heads[i])):
            continue
        offers = _attribute_offers(token.lower, heads.get(i), lex)
        fresh = [o.name for o in draw(rng, offers) if o.member not in said]
        texts += [put(parsed, {i: name}, caption) for name in fresh[:OFFERS]]
    return ordered(rng, texts, reason="no attribute with a known opposite or alternative")


@rule()
def replace_nouns(caption: str, rng: Random) -> Rewrites:
    """One noun becomes a co-hyponym: another thing of its kind, no synonym or hypernym of anything in the caption."""
    lex, parsed = lexicon(), parse(caption)
    lemmas = {phrase.lemma for phrase in parsed.phrases}
    said = set[str]().union(*map(lex.nouns.kin, lemmas))
    texts = []
    for phrase in parsed.phrases:
        if parsed.is_negated(phrase) or parsed.before(phrase) == "very":
            continue
        head = phrase.stop - 1
        game = _game_modifier(parsed, phrase, lex)
        if game is not None:
            games = [o.lemma for o in draw(rng, lex.nouns.offers(game)) if o.lemma not in lemmas]
            texts += [put(parsed, {head - 1: name}, caption) for name in games[:OFFERS]]
        if phrase.sense is None or phrase.head in lex.nouns.fixed or parsed.is_compound(phrase):
            continue
        if parsed.after(phrase) == "of" or (phrase.sense.count == "mass" and parsed.before(phrase) == "of"):
            continue
        drawn = [o for o in draw(rng, _noun_offers(parsed, phrase, phrase.sense, lex)) if o.lemma not in said]
        for offer, form in [(o, form) for o in drawn if (form := noun_for_slot(o, phrase))][:OFFERS]:
            changes = {head: form} | _pronouns(parsed, phrase, offer, lex)
            texts.append(put(parsed, changes, caption))
    return ordered(rng, texts, reason="no noun with a known co-hyponym")


@rule()
def replace_verbs(caption: str, rng: Random) -> Rewrites:
    """One verb becomes another action that excludes it, in the same form."""
    lex, parsed = lexicon(), parse(caption)
    texts = []
    for i, token in enumerate(parsed.tokens):
        base, form = lex.verbs.forms.get(token.lower, ("", ""))
        if token.letter not in "VG" or base not in lex.verbs:
            continue
        if parsed.tokens[i + 1 : i + 2] and parsed.tokens[i + 1].lower in ("down", "up"):
            continue
        use = "object" if re.match("[DPNCQ]|J+N", parsed.letters[i + 1 :]) else "alone"
        what = next((p.sense.group for p in parsed.phrases if p.start == i + 1 and p.sense), "")
        offers = [o.name for o in draw(rng, lex.verbs.offers(base)) if o.use in (use, what, "any")]
        texts += [put(parsed, {i: lex.verbs.inflect(name, form)}, caption) for name in offers[:OFFERS]]
    return ordered(rng, texts, reason="no verb with a known alternative")


@rule()
def replace_relations(caption: str, rng: Random) -> Rewrites:
    """One relation becomes its converse or another that excludes it: left, above, under, behind, into, without, ..."""
    lex, parsed = lexicon(), parse(caption)
    texts = []
    for i, token in enumerate(parsed.tokens):
        if mirrored := _mirrored(parsed, i):
            texts.append(put(parsed, {i: mirrored}, caption))
        elif token.letter == "I" and token.lower in lex.relations and joins_things(parsed, i, lex):
            offers = draw(rng, lex.relations.offers(token.lower))
            texts += [put(parsed, {i: o.name}, caption) for o in offers[:OFFERS]]
    return ordered(rng, texts, reason="no relation with a known converse")


def _exchangeable(parsed: Parsed, lex: Lexicon) -> Iterator[tuple[Phrase, Phrase, str]]:
    """Pairs of different things, and why their places mean the same ("and", "next to"; "" where they do not)."""
    phrases = [phrase for phrase in parsed.phrases if _is_thing(parsed, phrase, lex)]
    for a, b in combinations(phrases, 2):
        if lex.nouns.related(a.lemma, b.lemma):
            continue
        same = equivalent(parsed, a, b, lex)
        if not (same and parsed.attributes(a) == parsed.attributes(b)):
            yield a, b, same


_ON, _IN = "lands one is on", "lands one is in"

# -- nouns -------------------------------------------------------------------------------------------------------------


def _is_thing(parsed: Parsed, phrase: Phrase, lex: Lexicon) -> bool:
    """Whether a phrase names something that can trade places with something else."""
    if "of" in (parsed.before(phrase), parsed.after(phrase)):
        return False
    if phrase.head in lex.nouns.fixed or phrase.determiner in ("no", "each", "every", "another", "both", "either"):
        return False
    if phrase.sense is None:
        return phrase.determiner in ("a", "an", "the")
    return phrase.sense.group not in ("day parts", "weather", "games")


def _noun_offers(parsed: Parsed, phrase: Phrase, sense: Noun, lex: Lexicon) -> list[Noun]:
    """What may stand in a noun's place; in a field one is in, where no caption says "in a beach"."""
    if sense.group == _ON and parsed.before(phrase) in ("in", "into", "through"):
        return lex.nouns.offered(_IN)
    return lex.nouns.offers(sense)


def _game_modifier(parsed: Parsed, phrase: Phrase, lex: Lexicon) -> Noun | None:
    """The game in "tennis court", "baseball player"."""
    if phrase.stop - phrase.start < 2:
        return None
    readings = lex.nouns.readings(parsed.tokens[phrase.stop - 2].lower)
    return next((noun for noun, _ in readings if noun.group == "games"), None)


_PRONOUNS = {
    "he": {("she", "O"): "he", ("her", "O"): "him", ("her", "P"): "his", ("herself", "O"): "himself"},
    "she": {("he", "O"): "she", ("him", "O"): "her", ("his", "P"): "her", ("himself", "O"): "herself"},
}


def _pronouns(parsed: Parsed, phrase: Phrase, offer: Noun, lex: Lexicon) -> dict[int, str]:
    """Pronouns made to agree with the offer, when the phrase is the caption's only person or animal."""
    gender = lex.genders.get(offer.lemma, "")
    if not gender or sum(bool(p.sense and p.sense.animate) for p in parsed.phrases) != 1:
        return {}
    table = _PRONOUNS[gender]
    return {i: table[t.lower, t.letter] for i, t in enumerate(parsed.tokens) if (t.lower, t.letter) in table}


def _attribute_offers(name: str, head: Phrase | None, lex: Lexicon) -> list[Value]:
    groups = lex.attributes.groups(name)
    for group, domain, lemmas, offers in lex.contexts:
        if head and group in groups and (head.lemma in lemmas or (head.sense and head.sense.domain == domain)):
            return [offer for offer in offers if not lex.attributes.same(offer.name, name)]
    return lex.attributes.offers(name)


# -- relations ---------------------------------------------------------------------------------------------------------

_SIDES = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}
_SIDE_BEFORE = re.compile(
    r"(facing|faces|face|faced|looking|looks|the|on|to|far|top|bottom|upper|lower|his|her|its|at)$"
)
_SIDE_AFTER = re.compile(r"(side|corner|hand|edge|foot|leg|arm|eye|half|of|top|bottom|screen)")


def _mirrored(parsed: Parsed, i: int) -> str:
    """The token at i with left and right exchanged where they are sides, else ""."""
    token = parsed.tokens[i]
    sides = [word for word in token.lower.split() if word in _SIDES]
    if not sides:
        return ""
    if " " not in token.lower:
        before = parsed.tokens[i - 1].lower if i else ""
        after = parsed.tokens[i + 1].lower if i + 1 < len(parsed.tokens) else ""
        if not _SIDE_BEFORE.search(before) and not _SIDE_AFTER.match(after):
            return ""
    return " ".join(_SIDES.get(word, word) for word in token.lower.split())
