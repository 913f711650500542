"""Kinds that add what the caption does not say: an attribute or an object (SugarCrepe's add kinds, arXiv 2306.14610).

A picture may show more than its caption says, so an addition is less sure to be false than a replacement: added are
attributes that things seldom have, and things of a kind that is named already. Siblings are asked by the filters.
"""

from __future__ import annotations

from random import Random

from clipkit.negatives.english import as_words, write
from clipkit.negatives.lexicon import Lexicon, Noun, lexicon
from clipkit.negatives.rewrites import OFFERS, Rewrites, draw, ordered
from clipkit.negatives.tagging import Parsed, Phrase, parse
from clipkit.registry import rule


@rule()
def add_attributes(caption: str, rng: Random) -> Rewrites:
    """A thing without attributes gets one that such things seldom have."""
    lex, parsed = lexicon(), parse(caption)
    said = {token.lower for token in parsed.tokens}
    texts = []
    for phrase in parsed.phrases:
        if phrase.modifiers or not _is_plain(parsed, phrase, lex):
            continue
        assert phrase.sense is not None
        seldom = lex.added.get(phrase.sense.group) or lex.added[phrase.sense.domain or "thing"]
        names = [name for name in seldom if name not in said]
        texts += [_insert(parsed, phrase.stop - 1, name, caption) for name in draw(rng, names)[:OFFERS]]
    return ordered(rng, texts, reason="no known thing without an attribute")


@rule()
def add_objects(caption: str, rng: Random) -> Rewrites:
    """A thing gets company: another of its kind, that the caption does not name, behind it with "and"."""
    lex, parsed = lexicon(), parse(caption)
    said = set[str]().union(*(lex.nouns.kin(phrase.lemma) for phrase in parsed.phrases))
    texts = []
    for number, phrase in enumerate(parsed.phrases):
        if not _is_plain(parsed, phrase, lex) or not _takes_company(parsed, number, lex):
            continue
        assert phrase.sense is not None
        offers = [o for o in draw(rng, lex.nouns.offers(phrase.sense)) if o.lemma not in said]
        texts += [_insert(parsed, phrase.stop, f"and {_named(o, phrase)}", caption) for o in offers[:OFFERS]]
    return ordered(rng, texts, reason="no known thing that could have company")


def _is_plain(parsed: Parsed, phrase: Phrase, lex: Lexicon) -> bool:
    """Whether a phrase names one known kind of thing, not a part of something and nothing absent."""
    sense = phrase.sense
    if sense is None or not sense.group or sense.group in lex.unadorned or phrase.head in lex.nouns.fixed:
        return False
    if "of" in (parsed.before(phrase), parsed.after(phrase)) or parsed.is_compound(phrase) or parsed.is_negated(phrase):
        return False
    return sense.count in ("count", "plural") and (phrase.determiner in ("a", "an", "the") or phrase.plural)


def _takes_company(parsed: Parsed, number: int, lex: Lexicon) -> bool:
    """Whether "and another" can follow: nothing more is said of the thing, and no verb or pronoun agrees with it."""
    phrase, letters = parsed.phrases[number], parsed.letters
    before, after = letters[max(0, phrase.start - 1) : phrase.start], letters[phrase.stop : phrase.stop + 1]
    if before in ("&", ",", "S") or after in ("&", ",", "N", "S", "W", "O", "J"):
        return False
    if phrase.determiner == "the" and parsed.before(phrase) in ("in", "on", "at"):
        return False
    if before in ("V", "G", "I") and after in ("", ".", "I"):
        return True
    verbs = (lex.verbs.forms.get(token.lower, ("", ""))[1] for token in parsed.tokens[phrase.stop :])
    return not before and not set("BVPO") & set(letters) and "third" not in verbs  # "jumps", taken for a noun


def _named(noun: Noun, beside: Phrase) -> str:
    """A noun as company: plural beside plurals without a number, else with an article, which `write` makes agree."""
    if noun.count != "count":
        return noun.lemma
    return noun.plural if beside.plural and not beside.number else f"a {noun.lemma}"


def _insert(parsed: Parsed, place: int, text: str, caption: str) -> str:
    words = as_words(parsed.tokens)
    added = [(word, " ") for word in text.split()]
    return write(words[:place] + added + words[place:], caption)
