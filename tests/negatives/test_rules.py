from __future__ import annotations

import re
from collections import Counter
from itertools import permutations
from random import Random

import pytest

from clipkit.negatives.english import article
from clipkit.negatives.filters import concept
from clipkit.negatives.make import KINDS
from clipkit.registry import RULES

CAPTIONS = [
    "A man in a blue shirt is standing on a ladder cleaning a window .",
    "A young boy in a red hat throws a ball to an old woman .",
    "Two brown dogs run through the snow with a stick .",
    "A girl and a boy sit next to an orange bench.",
    "mike is on the left kicking the ball towards jenny",
    "the cat is watching the snake",
    "jenny is very happy and mike is sad",
    "a small red striped circle is to the left of a big blue square",
    "a picture of two green stars and three orange hearts",
    "An elephant is walking behind a group of people near a lake .",
    "The horse and rider are jumping over a white fence .",
    "A black and white dog is chasing a brown cat",
    "A woman's umbrella is open.",
    "An hour later the man rides an empty bus.",
]


def candidates(kind: str, caption: str, seed: int = 0) -> list[str]:
    return RULES[kind](caption, Random(seed))


def everything(kind: str, caption: str, seeds: int = 40) -> set[str]:
    return {text for seed in range(seeds) for text in candidates(kind, caption, seed)}


def bag(text: str) -> list[str]:
    return sorted(concept(word) for word in re.findall(r"'s\b|[\w-]+", text.lower()))


@pytest.mark.parametrize("kind", sorted(RULES))
def test_pure_and_never_the_original(kind: str) -> None:
    for caption in CAPTIONS:
        texts = candidates(kind, caption)
        assert texts == candidates(kind, caption)
        assert caption.lower() not in [text.lower() for text in texts]
        assert len(set(texts)) == len(texts)
        assert bool(texts) != bool(RULES[kind](caption, Random(0)).reason)


@pytest.mark.parametrize("kind", sorted(RULES))
def test_words_are_kept_changed_or_added(kind: str) -> None:
    """Swaps keep them, replacements change them, additions and denials add to them."""
    for caption in CAPTIONS:
        for text in everything(kind, caption, 5):
            ours, theirs = Counter(bag(text)), Counter(bag(caption))
            assert (ours == theirs) is kind.startswith(("swap", "reshuffle", "permute")), text
            assert kind.startswith("add") <= (theirs < ours), text


@pytest.mark.parametrize("kind", sorted(set(RULES) - {"reshuffle"}))
def test_articles_and_capitals(kind: str) -> None:
    for caption in CAPTIONS:
        for text in everything(kind, caption, 10):
            for a, b in re.findall(r"\b(an?) (\w+)", text, re.IGNORECASE):
                assert a.lower() == article(b), text
            assert text[0].isupper() == caption[0].isupper()
            assert not re.search(r"\s(A|An|The|Two)\s", text), text


@pytest.mark.parametrize(
    ("kind", "caption", "expected"),
    [
        ("swap_nouns", "mike is running toward jenny", {"jenny is running toward mike"}),
        ("swap_nouns", "A dog chases two cats.", {"A cat chases two dogs."}),
        (
            "swap_nouns",
            "a small red circle is to the left of a big blue square",
            {
                "a big blue square is to the left of a small red circle",
                "a small red square is to the left of a big blue circle",
            },
        ),
        ("swap_nouns", "An apple is under a table", {"A table is under an apple"}),
        ("swap_noun_phrases", "An apple is under a table", {"A table is under an apple"}),
        ("swap_adjectives", "a red ball and a blue box", {"a blue ball and a red box"}),
        ("swap_adjectives", "jenny is happy and mike is sad", {"jenny is sad and mike is happy"}),
        ("swap_adjectives", "two red circles and three blue stars", {
            "three red circles and two blue stars", "two blue circles and three red stars",
        }),
        ("swap_adjectives", "A dog carries an orange ball", {"An orange dog carries a ball"}),
        ("replace_relations", "a cat behind a tree", {"a cat in front of a tree"}),
        ("replace_relations", "mike is on the left", {"mike is on the right"}),
        ("replace_nouns", "jenny is mad", {"mike is mad"}),
        ("replace_nouns", "A mother holds her own hat", {"A father holds his own hat"}),
        ("swap_roles", "A brown dog is chasing a cat .", {"A cat is chasing a brown dog ."}),
        ("swap_roles", "A man is watching his dog .", {"A dog is watching his man ."}),
        ("swap_verb_phrases", "A dog runs far while a woman watches", {"A dog watches while a woman runs far"}),
        ("swap_adverbs", "A slowly walking man quickly eats .", {"A quickly walking man slowly eats ."}),
        ("swap_adverbs", "A boy wearing only green shorts poses awkwardly .", set()),
        ("swap_nouns", "A DOG ON A BENCH", {"A BENCH ON A DOG"}),
        ("swap_nouns", "A photo of group A and a dog on a bench", {"A photo of group A and a bench on a dog"}),
        ("swap_nouns", "A man holding hands with a woman", set()),
        ("swap_nouns", "A boy is lying in bed with a dog", {"A bed is lying in boy with a dog"}),
        ("swap_noun_phrases", "A woman facing a man", set()),
        ("replace_verbs", "two people on their walk", set()),
        ("negate", "Nobody is on the bench", set()),
        ("add_objects", "A boy in red jumps backward", set()),
        ("permute_concepts", "a red ball and a blue box", {"a blue ball and a red box"}),
        ("permute_concepts", "A dog on a bench behind a tree", {"A dog behind a bench on a tree"}),
        ("permute_concepts", "A woman in a red hat and a black coat", {"A woman in a red coat and a black hat"}),
        ("replace_numbers", "Two dogs run", {"Three dogs run", "Six dogs run"}),
        ("replace_numbers", "2 dogs run", {"3 dogs run"}),
        ("negate", "A dog is sitting .", {"A dog is not sitting ."}),
        ("negate", "A dog catches a ball .", {"A dog does not catch a ball ."}),
        ("negate", "Two dogs run .", {"Two dogs do not run ."}),
        ("negate", "A dog running", {"A dog not running"}),
        ("negate", "There is a dog", {"There is no dog"}),
        ("negate", "A man with a hat", {"A man without a hat"}),
        ("add_attributes", "A cat on an old bench", {"An orange cat on an old bench"}),
        ("add_attributes", "A tall man rides a bicycle", {"A tall man rides an orange bicycle"}),
        ("add_objects", "A man holds a kite .", {"A man holds a kite and a balloon ."}),
        ("add_objects", "A man holds a sword .", {"A man holds a sword and an umbrella ."}),
        ("add_objects", "Two dogs in a field", {"Two dogs and a cat in a field"}),
    ],
)  # fmt: skip
def test_expected_rewrites(kind: str, caption: str, expected: set[str]) -> None:
    assert expected <= everything(kind, caption)


def test_swapped_phrases_keep_what_is_whose() -> None:
    found = everything("swap_noun_phrases", "a small red circle is to the left of a big blue square")
    assert found == {"a big blue square is to the left of a small red circle"}


def test_places_of_one_preposition_are_not_exchanged() -> None:
    assert "a man in a shop in a hat" not in everything("swap_noun_phrases", "a man in a hat in a shop")


@pytest.mark.parametrize(
    ("kind", "caption"),
    [
        ("swap_nouns", "A dog and a cat"),
        ("swap_nouns", "a circle next to a square"),
        ("swap_nouns", "A man is standing beside a horse ."),
        ("swap_nouns", "a circle, together with a square"),
        ("swap_nouns", "A man talks to a woman"),
        ("swap_nouns", "a man watches a man"),
        ("swap_nouns", "A person helps a man"),
        ("swap_nouns", "a bowl of ice cream"),
        ("swap_noun_phrases", "a red dog and a black cat"),
        ("swap_noun_phrases", "a red circle next to a blue square"),
        ("swap_adjectives", "a red circle and a blue circle"),
        ("swap_adjectives", "a black and white dog"),
        ("swap_adjectives", "a big dog chases a large cat"),
        ("replace_nouns", "there is no heart"),
        ("replace_adjectives", "a star without red circles"),
        ("reshuffle", "A dog ."),
        ("swap_roles", "A man talks to a woman"),
        ("swap_roles", "A dog is running on the beach"),
        ("swap_verb_phrases", "A man sits while another man stands"),
        ("permute_concepts", "Several women and men are lifting their arms"),
        ("permute_concepts", "a black and white dog"),
        ("replace_numbers", "A two year old boy"),
        ("negate", "A dog is not running"),
        ("add_attributes", "a small dog"),
        ("add_objects", "A dog runs"),
    ],
)
def test_nothing_that_would_stay_true(kind: str, caption: str) -> None:
    rewrites = RULES[kind](caption, Random(0))
    assert rewrites == [] and rewrites.reason


def test_replacements_avoid_what_the_caption_names() -> None:
    texts = everything("replace_nouns", "a dog and a cat")
    assert not any(re.search(r"\b(dog|puppy|animal)\b.*\b(dog|puppy|animal)\b", text) for text in texts)
    assert "a horse and a cat" in texts


def test_moods_and_names_of_the_abstract_scenes() -> None:
    assert {"mike is sad", "mike is angry", "mike is surprised"} <= everything("replace_adjectives", "mike is happy")
    assert "mike is standing" in everything("replace_verbs", "mike is sitting")


def test_fur_takes_natural_colours_only() -> None:
    texts = everything("replace_adjectives", "a brown dog")
    assert texts == {"a black dog", "a white dog", "a gray dog"}


def test_a_reshuffle_is_no_paraphrase() -> None:
    things = ("a red star", "a blue square", "a green heart")
    lists = {"{}, {} and {}".format(*order) for order in permutations(things)}
    assert not lists & everything("reshuffle", "{}, {} and {}".format(*things), 200)
    assert "near the house a dog stands" not in everything("reshuffle", "a dog stands near the house", 200)


def test_the_five_kinds_are_registered_and_described() -> None:
    assert set(KINDS) <= set(RULES)
    assert all(RULES.entry(kind).summary for kind in RULES)
