from __future__ import annotations

from collections import Counter

import pytest

from clipkit.negatives.lexicon import lexicon


def test_each_noun_sense_stands_in_one_group() -> None:
    senses = {noun for readings in lexicon().nouns.forms.values() for noun, _ in readings}
    twice = [key for key, n in Counter((noun.lemma, noun.count) for noun in senses).items() if n > 1]
    assert not twice
    assert len(senses) > 1000


def test_no_offer_is_a_synonym_or_hypernym() -> None:
    nouns = lexicon().nouns
    for readings in list(nouns.forms.values()):
        for noun, _ in readings:
            assert not [offer.lemma for offer in nouns.offers(noun) if nouns.related(noun.lemma, offer.lemma)]


@pytest.mark.parametrize(
    ("a", "b", "related"),
    [
        ("dog", "puppy", True),
        ("dog", "animal", True),
        ("animal", "dog", True),
        ("boy", "child", True),
        ("man", "woman", False),
        ("dog", "cat", False),
        ("zyx", "zyx", True),
    ],
)
def test_kinship(a: str, b: str, related: bool) -> None:
    assert lexicon().nouns.related(a, b) is related


@pytest.mark.parametrize(
    ("lemma", "plural"),
    [
        ("man", "men"),
        ("police officer", "police officers"),
        ("fireman", "firemen"),
        ("human", "humans"),
        ("bench", "benches"),
        ("puppy", "puppies"),
        ("monkey", "monkeys"),
        ("sheep", "sheep"),
        ("wedding dress", "wedding dresses"),
    ],
)
def test_plurals(lemma: str, plural: str) -> None:
    assert lexicon().nouns.plural(lemma) == plural


def test_attributes_offer_only_what_excludes_them() -> None:
    attributes = lexicon().attributes
    assert {value.name for value in attributes.offers("huge")} == {"small"}
    assert "grey" not in {value.name for value in attributes.offers("gray")}
    assert {value.name for value in attributes.offers("med")} == {"small", "large"}
    for name in attributes.by_name:
        assert not [offer for offer in attributes.offers(name) if attributes.same(name, offer.name)]


def test_verb_forms() -> None:
    verbs = lexicon().verbs
    assert verbs.forms["sitting"] == ("sit", "gerund")
    assert verbs.forms["catches"] == ("catch", "third")
    assert verbs.inflect("lie", "gerund") == "lying"
    assert verbs.inflect("drop", "gerund") == "dropping"
    assert verbs.inflect("ride", "gerund") == "riding"


def test_relations_are_mutual() -> None:
    relations = lexicon().relations
    assert [value.name for value in relations.offers("to the left of")] == ["to the right of"]
    assert {value.name for value in relations.offers("behind")} == {"in front of"}
