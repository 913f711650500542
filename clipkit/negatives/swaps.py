"""When two things may trade places or attributes, and in which form a noun fits where another stood."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from clipkit.negatives.lexicon import Lexicon, Noun
from clipkit.negatives.tagging import Parsed, Phrase, Token

_AND = ("also", "together with", "along with", "as well as", "plus")
_ONE = ("a", "an", "another", "each", "every", "one", "this", "that")


def equivalent(parsed: Parsed, a: Phrase, b: Phrase, lex: Lexicon) -> str:
    """Why exchanging two bare things would leave the caption true: list, relation or worn; else ""."""
    between = parsed.tokens[a.stop : b.start]
    inside = [p for p in parsed.phrases if a.stop <= p.start and p.stop <= b.start]
    covered = {i for p in inside for i in range(p.start, p.stop)}
    joints = [t for i, t in enumerate(between, a.stop) if i not in covered]
    if joints and all(token.letter in ",&" or token.lower in _AND for token in joints):
        return "list"
    if len(joints) == 1 and joints[0].letter == "I" and joints[0].lower == parsed.before(a):
        return "relation"  # "in a hat in a shop" is "in a shop in a hat"
    if _both(a, b, "worn") and not any(p.sense and p.sense.animate for p in inside):
        return "worn"
    if not inside and _symmetric(between, a, b, lex):
        return "relation"
    if animate(a) and animate(b) and _together(between, inside, lex):
        return "relation"
    return ""


def _symmetric(between: tuple[Token, ...], a: Phrase, b: Phrase, lex: Lexicon) -> bool:
    alike = animate(a) == animate(b)
    telling = [token for token in between if not _is_posture(token, lex)]
    if len(telling) == 1 and telling[0].lower in lex.symmetric:
        return telling[0].lower != "with" or (alike and animate(a))
    verbs = [token for token in between if token.letter in "VG"]
    if len(verbs) != 1 or not alike or lex.verbs.forms.get(verbs[0].lower, ("", ""))[0] not in lex.symmetric_verbs:
        return False
    rest = [token.lower for token in between if token is not verbs[0] and token.letter not in "BR"]
    return all(word in ("to", "with", "against") for word in rest)


def _together(between: tuple[Token, ...], inside: list[Phrase], lex: Lexicon) -> bool:
    """Whether two do one thing with each other: "lying in bed with", "holding hands with"."""
    if not between or between[-1].lower != "with" or any(p.sense and p.sense.domain == "worn" for p in inside):
        return False
    verbs = [(token, following) for token, following in pairwise(between) if token.letter in "VG"]
    return bool(verbs) and all(_is_mutual(verb, following, lex) for verb, following in verbs)


def _is_mutual(verb: Token, following: Token, lex: Lexicon) -> bool:
    base = lex.verbs.forms.get(verb.lower, ("", ""))[0]
    hands = base in ("hold", "shake") and following.lower == "hands"
    return hands or base in lex.postures or base in lex.symmetric_verbs


def _is_posture(token: Token, lex: Lexicon) -> bool:
    if token.letter in "BR" or token.lower in ("seated", "parked", "located", "gathered"):
        return True
    return token.letter in "VG" and lex.verbs.forms.get(token.lower, ("", ""))[0] in lex.postures


def _both(a: Phrase, b: Phrase, domain: str) -> bool:
    return bool(a.sense and b.sense and a.sense.domain == b.sense.domain == domain)


def animate(phrase: Phrase) -> bool:
    """Whether a phrase names a person or an animal."""
    return bool(phrase.sense and phrase.sense.animate)


def may_move(parsed: Parsed, a: Phrase, b: Phrase) -> bool:
    """Whether the two phrases can trade places whole: no pronoun is torn off its owner, verbs still agree."""
    for phrase in (a, b):
        if phrase.determiner not in ("", "a", "an", "the", "some", "two"):
            return False
        if not phrase.determiner and parsed.letters[phrase.start - 2 : phrase.start] == "IG":
            return False  # "near blossoming trees": a participle that stays behind
        bare = not phrase.determiner and not phrase.number and not phrase.plural
        if bare and phrase.sense and phrase.sense.count == "count":
            return False
    return a.plural == b.plural or not set("BV") & set(parsed.letters)


def noun_for_slot(noun: Phrase | Noun, slot: Phrase) -> str:
    """The form in which a noun can stand as the head of `slot`; "" when it cannot."""
    sense = noun.sense if isinstance(noun, Phrase) else noun
    if sense is None:
        assert isinstance(noun, Phrase)
        return noun.head if noun.plural == slot.plural and not _uncounted(slot) else ""
    if sense.count == "name" or (slot.sense and slot.sense.count == "name"):
        return sense.lemma if slot.sense and slot.sense.count == sense.count else ""
    if slot.plural:
        return sense.plural
    if sense.count == "mass":
        return sense.lemma if slot.determiner not in _ONE and slot.number != "one" else ""
    return sense.lemma if sense.count == "count" and not _uncounted(slot) else ""


def _uncounted(slot: Phrase) -> bool:
    """Whether a singular count noun cannot stand here: "in grass", "some water"."""
    return bool(slot.sense and slot.sense.count == "mass" and slot.determiner in ("", "some"))


_PLACES = ("waters", "grounds", "routes", "lands one is on", "lands one is in", "buildings", "rooms")


def suits(attribute: str, phrase: Phrase, lex: Lexicon) -> bool:
    """Whether an attribute can be said of what a phrase names: colours of no person, ages of the living, ..."""
    sense = phrase.sense
    if sense is None:
        return False
    wanted = {lex.said_of.get(group, "") for group in lex.attributes.groups(attribute)}
    able = {"", "thing" if sense.domain != "person" else "", "living" if sense.animate else "", sense.domain}
    return bool(wanted) and wanted <= able | ({"place"} if sense.group in _PLACES else set())


def alone(parsed: Parsed, i: int, phrase: Phrase) -> bool:
    """Whether the attribute at i is the only one of a phrase, and a plain one ("red", not "very red" or "two")."""
    return phrase.modifiers == (i,) and parsed.letters[i] == "J" and parsed.letters[i - 1 : i] != "R"


def may_trade(parsed: Parsed, i: int, a: Phrase, j: int, b: Phrase, lex: Lexicon) -> bool:
    """Whether exchanging the attributes at i (of a) and j (of b) changes what the caption says."""
    left, right = parsed.tokens[i].lower, parsed.tokens[j].lower
    if lex.attributes.same(left, right):
        return False
    if (parsed.tokens[i].letter == "C") != (parsed.tokens[j].letter == "C"):
        return False
    ours, theirs = parsed.attributes(a) | {left}, parsed.attributes(b) | {right}
    if right in ours or left in theirs:
        return False
    if not lex.nouns.related(a.lemma, b.lemma):
        return True
    return not equivalent(parsed, a, b, lex) or ours - {left} != theirs - {right}


def moves(parsed: Parsed, owned: list[tuple[int, Phrase]], lex: Lexicon) -> Iterator[list[int]]:
    """Orders of the tokens in which one attribute went over to another thing: a red ball, a box → a ball, a red box."""
    for i, owner in owned:
        joined = set(parsed.letters[max(0, i - 1) : i + 2]) & set("R&,")
        if parsed.tokens[i].letter != "J" or i not in owner.modifiers or joined:
            continue
        for other in parsed.phrases:
            if other is owner or not _takes(parsed, i, owner, other, lex):
                continue
            place = next((k for k in other.modifiers if _stands_behind(parsed, k, i, lex)), None)
            if place is None:
                place = max(other.modifiers, default=other.stop - 2) + 1
            order = [k for k in range(len(parsed.tokens)) if k != i]
            order.insert(order.index(place), i)
            yield order


def _stands_behind(parsed: Parsed, k: int, i: int, lex: Lexicon) -> bool:
    """Whether the attribute at i stands before the one at k; a word of no group may be a noun ("chew toy")."""
    return _rank(parsed, k, lex) > _rank(parsed, i, lex) or parsed.tokens[k].lower not in lex.attributes


def _takes(parsed: Parsed, i: int, owner: Phrase, other: Phrase, lex: Lexicon) -> bool:
    """Whether the attribute at i can move from its owner to another thing."""
    name = parsed.tokens[i].lower
    if (name, other.lemma) in lex.natural:
        return False
    if _MADE_OF & lex.attributes.groups(name) and other.sense and other.sense.group == "waters":
        return False
    if other.head in lex.nouns.fixed or parsed.is_compound(other) or lex.nouns.related(owner.lemma, other.lemma):
        return False
    groups = lex.attributes.groups(name)
    taken = {group for k in other.modifiers for group in lex.attributes.groups(parsed.tokens[k].lower)}
    return suits(name, other, lex) and not groups & taken


_MADE_OF = {"materials", "fabrics"}
_LATE = {"colours": 1, "hair colours": 1, "patterns": 2, "terrains": 2, "materials": 3, "fabrics": 3, "sexes": 2}


def _rank(parsed: Parsed, i: int, lex: Lexicon) -> int:
    """Where an attribute stands among others: number, size and age, colour, pattern, material."""
    if parsed.tokens[i].letter == "C":
        return -1
    return max((_LATE.get(group, 0) for group in lex.attributes.groups(parsed.tokens[i].lower)), default=0)


def joins_things(parsed: Parsed, i: int, lex: Lexicon) -> bool:
    """Whether the relation at i stands before a thing ("on a bench", not "on a sunny day", "plays with", "sits up")."""
    following = next((p for p in parsed.phrases if p.start == i + 1), None)
    if following is None or following.sense is None or following.head in lex.nouns.fixed:
        return False
    word = parsed.tokens[i].lower
    before = parsed.tokens[i - 1] if i else None
    if word == "by" and before and (before.letter == "X" or before.lower.endswith("ed")):
        return False
    if word == "after" and before and before.letter in "VG":
        return False
    if word == "with":
        return parsed.tokens[i - 1].letter == "N"
    return not (word == "on" and following.sense.group in ("dog gear", "day parts", "devices", "signs"))


def owned_attributes(parsed: Parsed, lex: Lexicon) -> list[tuple[int, Phrase]]:
    """(position, the phrase it is said of) of the attributes that can move."""
    owned = [(i, phrase) for phrase in parsed.phrases for i in phrase.modifiers]
    owned += [(i, parsed.phrases[owner]) for i, owner in parsed.predicates]
    return [(i, phrase) for i, phrase in owned if parsed.tokens[i].lower not in lex.fixed_attributes]
