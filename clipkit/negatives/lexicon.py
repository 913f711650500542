"""The packaged word lists: groups of co-hyponyms, relations and turns of speech (data/*.yaml), read once.

A group holds things (or attributes, or actions) of one kind that exclude one another, so that putting one for
another makes a caption false: never a synonym, never a hypernym.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from itertools import count
from typing import Any

MARKS = {"*": "plural", "~": "mass", "^": "name"}


@dataclass(frozen=True, slots=True)
class Noun:
    """One sense of a noun. `count` is count, plural (always so: shorts), mass (snow) or name (mike)."""

    lemma: str
    plural: str
    count: str
    group: str
    member: int
    domain: str

    @property
    def animate(self) -> bool:
        """Whether it names a person or an animal."""
        return self.domain in ("person", "animal")


@dataclass(frozen=True, slots=True)
class Value:
    """One attribute value or action, in one group; `use` is a verb group's use (any, alone, object, a noun group)."""

    name: str
    group: str
    member: int
    use: str = "any"


class Groups:
    """Members of groups by name, and what may be offered in the place of each."""

    def __init__(self, tree: dict[str, Any]):
        self.by_name: dict[str, list[Value]] = {}
        self._offered: dict[str, list[Value]] = {}
        self._directed: dict[str, list[Value]] = {}
        self._offers: dict[str, list[Value]] = {}
        numbers = count(1)
        for group, content in tree["groups"].items():
            for member, (offered, other) in zip(numbers, _members(content["members"])):
                values = [Value(name, group, member, content.get("use", "any")) for name in offered + other]
                self._offered.setdefault(group, []).extend(values[: len(offered)])
                for value in values:
                    self.by_name.setdefault(value.name, []).append(value)
        for left, right in tree.get("directed", {}).items():
            values = self.find(words(right))
            for name in words(left, "/"):
                self._directed[name] = values
                self.by_name.setdefault(name, [])

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def offers(self, name: str) -> list[Value]:
        """Values that cannot hold where `name` holds."""
        if name not in self._offers:
            others = [
                other
                for value in self.by_name.get(name, ())
                for other in self._offered[value.group]
                if other.member != value.member
            ]
            self._offers[name] = others + self._directed.get(name, [])
        return self._offers[name]

    def find(self, names: Iterable[str]) -> list[Value]:
        """A value for each name, outside all groups for an unknown one."""
        return [(self.by_name.get(name) or [Value(name, "", 0)])[0] for name in names]

    def same(self, a: str, b: str) -> bool:
        """Whether two names stand for one member."""
        members = {value.member for value in self.by_name.get(a, ())}
        return a == b or any(value.member in members for value in self.by_name.get(b, ()))

    def groups(self, name: str) -> set[str]:
        """The groups `name` belongs to."""
        return {value.group for value in self.by_name.get(name, ())}


class Nouns:
    """Noun senses by written form, and what may be offered in the place of each."""

    def __init__(self, tree: dict[str, Any]):
        self._irregular = dict(pair.split(": ") for pair in words(tree["irregular"]))
        self.forms: dict[str, list[tuple[Noun, bool]]] = {}
        self.fixed = frozenset(words(tree["fixed"]))
        self.sealed = words(tree["sealed"])
        self._offered: dict[str, list[Noun]] = {}
        self._directed: dict[str, list[Noun]] = {}
        self._offers: dict[Noun, list[Noun]] = {}
        self._kin: dict[str, frozenset[str]] = {}
        self._hypernyms: dict[str, frozenset[str]] = {}
        self._groups_below: dict[str, list[str]] = {}
        self._members: dict[int, list[str]] = {}
        self._lemmas: dict[str, list[str]] = {}
        numbers = count(1)
        for group, content in tree["groups"].items():
            self._hypernyms[group] = frozenset(words(content.get("of", "")))
            for name in self._hypernyms[group]:
                self._groups_below.setdefault(name, []).append(group)
            for member, (offered, other) in zip(numbers, _members(content["members"])):
                senses = [self._noun(n, group, member, content.get("domain", "")) for n in offered + other]
                self._offered.setdefault(group, []).extend(senses[: len(offered)])
                self._members[member] = [sense.lemma for sense in senses]
                self._lemmas.setdefault(group, []).extend(self._members[member])
                for sense in senses:
                    self._file(sense)
        persons = set(words(tree["persons"]))
        for left, right in tree["directed"].items():
            offers = [self._known(name) for name in words(right)]
            for name in words(left, "/"):
                sense = self._noun(name, "", 0, "person" if name in persons else "")
                self._file(sense)
                self._directed[sense.lemma] = offers

    def readings(self, form: str) -> list[tuple[Noun, bool]]:
        """Every (sense, whether plural) a written form can have; empty when unknown."""
        return self.forms.get(form, [])

    def offers(self, noun: Noun) -> list[Noun]:
        """Senses that cannot hold of the thing `noun` names."""
        if not noun.group:
            return self._directed[noun.lemma]
        if noun not in self._offers:
            self._offers[noun] = [other for other in self._offered[noun.group] if other.member != noun.member]
        return self._offers[noun]

    def offered(self, group: str) -> list[Noun]:
        """All of a group that are offered."""
        return self._offered[group]

    def related(self, a: str, b: str) -> bool:
        """Whether two lemmas may name one thing: the same, synonyms, or one the other's hypernym."""
        return b in self.kin(a)

    def kin(self, lemma: str) -> frozenset[str]:
        """The lemma itself, its synonyms, its hypernyms and its hyponyms."""
        if lemma not in self.forms and lemma not in self._groups_below:
            return frozenset((lemma,))
        if lemma not in self._kin:
            senses = [noun for noun, _ in self.forms.get(lemma, ()) if noun.member]
            above = [self._hypernyms[noun.group] for noun in senses]
            beside = [self._members[noun.member] for noun in senses]
            below = [self._lemmas[group] for group in self._groups_below.get(lemma, ())]
            self._kin[lemma] = frozenset({lemma}.union(*above, *beside, *below))
        return self._kin[lemma]

    def plural(self, lemma: str) -> str:
        """The plural of a lemma; of several words the last changes."""
        head, space, last = lemma.rpartition(" ")
        if last.endswith(("man", "woman")) and last not in ("human", "german"):
            return head + space + last[:-2] + "en"
        return head + space + self._irregular.get(last, regular_plural(last))

    def lemma(self, form: str) -> str:
        """The lemma of a known form, else the form itself."""
        readings = self.forms.get(form)
        return readings[0][0].lemma if readings else form

    def _noun(self, marked: str, group: str, member: int, domain: str) -> Noun:
        kind = MARKS.get(marked[-1], "count")
        lemma = marked.rstrip("*~^")
        plural = {"count": self.plural(lemma) if kind == "count" else "", "plural": lemma}.get(kind, "")
        return Noun(lemma, plural, kind, group, member, domain)

    def _known(self, marked: str) -> Noun:
        lemma = marked.rstrip("*~^")
        known = self.forms.get(lemma)
        return known[0][0] if known else self._noun(marked, "", 0, "")

    def _file(self, noun: Noun) -> None:
        if noun.count != "plural":
            self.forms.setdefault(noun.lemma, []).append((noun, False))
        if noun.plural and (noun, True) not in self.forms.get(noun.plural, ()):
            self.forms.setdefault(noun.plural, []).append((noun, True))


class Verbs(Groups):
    """Actions by base form, and every written form of a known verb."""

    def __init__(self, tree: dict[str, Any]):
        super().__init__(tree)
        irregular = {base: forms.split() for base, forms in tree["irregular"].items()}
        self.forms: dict[str, tuple[str, str]] = {}
        self._inflected: dict[str, dict[str, str]] = {}
        for base in [*self.by_name, *words(tree["known"])]:
            third, gerund = irregular.get(base, (regular_plural(base), _regular_gerund(base)))
            self._inflected[base] = {"base": base, "third": third, "gerund": gerund}
            for form, written in self._inflected[base].items():
                self.forms.setdefault(written, (base, form))

    def inflect(self, base: str, form: str) -> str:
        """`base` in the form base, third or gerund."""
        return self._inflected[base][form]


@dataclass(frozen=True)
class Lexicon:
    """All word lists."""

    nouns: Nouns
    attributes: Groups
    verbs: Verbs
    relations: Groups
    tree: dict[str, Any]

    @cached_property
    def phrases(self) -> dict[str, list[tuple[tuple[str, ...], str]]]:
        """First word -> phrases of several words with their letter (see tagging), longest first."""
        relations, table = self.tree["relations"], {}
        relational = [*self.relations.by_name, *words(relations["symmetric"]), *words(relations["prepositions"])]
        for letter, phrases in (
            ("I", relational),
            ("Q", words(relations["quantities"])),
            ("N", [*self.nouns.forms, *self.nouns.sealed]),
            ("J", self.attributes.by_name),
        ):
            for phrase in phrases:
                parts = tuple(phrase.split())
                if len(parts) > 1:
                    table.setdefault(parts, letter)
        by_first: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for parts, letter in sorted(table.items(), key=lambda item: -len(item[0])):
            by_first.setdefault(parts[0], []).append((parts, letter))
        return by_first

    @cached_property
    def letters(self) -> dict[str, str]:
        """Small word → its letter."""
        return {word: letter for letter, text in self.tree["letters"].items() for word in text.split()}

    @cached_property
    def small_words(self) -> frozenset[str]:
        """Words without a content of their own."""
        return frozenset(word for word, letter in self.letters.items() if letter != "C")

    @cached_property
    def symmetric(self) -> frozenset[str]:
        """Words and phrases across which nothing is swapped."""
        return frozenset(words(self.tree["relations"]["symmetric"]))

    @cached_property
    def symmetric_verbs(self) -> frozenset[str]:
        """Base forms of verbs whose two sides can be exchanged."""
        return frozenset(words(self.tree["relations"]["symmetric verbs"]))

    @cached_property
    def postures(self) -> frozenset[str]:
        """Base forms of verbs that do not tell the two sides of a symmetric relation apart."""
        return frozenset(words(self.tree["relations"]["postures"]))

    @cached_property
    def no_manners(self) -> frozenset[str]:
        """Adverbs that do not say how something is done."""
        return frozenset(words(self.tree["relations"]["no manners"]))

    @cached_property
    def noun_attributes(self) -> frozenset[str]:
        """Attribute words that also stand before a noun as nouns (a metal pole)."""
        groups = self.tree["attributes"]["groups"]
        return frozenset(
            name
            for name, values in self.attributes.by_name.items()
            if any(groups[value.group].get("nouns") for value in values)
        )

    @cached_property
    def fixed_attributes(self) -> frozenset[str]:
        """Adjectives that are never swapped."""
        return frozenset(words(self.tree["attributes"]["fixed"]))

    @cached_property
    def said_of(self) -> dict[str, str]:
        """Attribute group -> what it can be said of: living, thing, worn or place."""
        return {name: c["of"] for name, c in self.tree["attributes"]["groups"].items() if "of" in c}

    @cached_property
    def contexts(self) -> list[tuple[str, str, frozenset[str], list[Value]]]:
        """(attribute group, domain, lemmas, offers): before such a head the group offers only these."""
        return [
            (
                c["group"],
                c.get("domain", "none"),
                frozenset(words(c["heads"])),
                self.attributes.find(words(c["offers"])),
            )
            for c in self.tree["attributes"]["contexts"]
        ]

    @cached_property
    def natural(self) -> frozenset[tuple[str, str]]:
        """(attribute, lemma of a noun) where the noun's things are so anyway."""
        tree = self.tree["attributes"]["natural"]
        return frozenset(
            (name, lemma) for names, text in tree.items() for name in words(names, "/") for lemma in words(text)
        )

    @cached_property
    def never_before(self) -> frozenset[str]:
        """Words before which an attribute is left alone."""
        return frozenset(words(self.tree["attributes"]["never before"]))

    @cached_property
    def names(self) -> frozenset[str]:
        """People's names, lower-case."""
        return frozenset(form for form, readings in self.nouns.forms.items() if readings[0][0].count == "name")

    @cached_property
    def added(self) -> dict[str, list[str]]:
        """Noun group or domain ("thing" where there is none) -> attributes that such a thing seldom has."""
        return {domain: words(text) for domain, text in self.tree["additions"]["attributes"].items()}

    @cached_property
    def unadorned(self) -> frozenset[str]:
        """Noun groups that get no attribute."""
        return frozenset(words(self.tree["additions"]["never"]))

    @cached_property
    def genders(self) -> dict[str, str]:
        """Lemma -> he or she."""
        return {lemma: gender for gender, text in self.tree["nouns"]["genders"].items() for lemma in words(text)}


@lru_cache(maxsize=1)
def lexicon() -> Lexicon:
    """The packaged lexicon."""
    tree = {name: _read(name) for name in ("nouns", "attributes", "verbs", "relations", "letters", "additions")}
    groups = {f"relation {i}": {"members": members} for i, members in enumerate(tree["relations"]["groups"])}
    return Lexicon(
        nouns=Nouns(tree["nouns"]),
        attributes=Groups(tree["attributes"]),
        verbs=Verbs(tree["verbs"]),
        relations=Groups({"groups": groups}),
        tree=tree,
    )


def words(text: str, separator: str = ",") -> list[str]:
    """The parts of a list written in one line."""
    return [part for piece in text.split(separator) if (part := " ".join(piece.split()).strip("'"))]


def _members(text: str) -> Iterable[tuple[list[str], list[str]]]:
    for member in words(text):
        offered, _, other = member.partition("|")
        yield words(offered, "/"), words(other, "/")


def _read(name: str) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((resources.files("clipkit.negatives") / "data" / f"{name}.yaml").read_text("utf-8"), Loader=loader)


def regular_plural(word: str) -> str:
    """The plural by the rules of spelling."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return word[:-1] + "ies"
    return word + "s"


def _regular_gerund(base: str) -> str:
    if re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", base):
        return base + base[-1] + "ing"
    return (base[:-1] if base.endswith("e") and not base.endswith("ee") else base) + "ing"
