from __future__ import annotations

import pytest

from clipkit.negatives.tagging import parse


def phrases(caption: str) -> list[str]:
    parsed = parse(caption)
    return [" ".join(t.lower for t in parsed.tokens[p.start : p.stop]) for p in parsed.phrases]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog jumps over a log .", ["a dog", "a log"]),
        ("two dogs race", ["two dogs"]),
        ("A young boy stands and watches a guard.", ["a young boy", "a guard"]),
        ("A small red circle is to the left of a big blue square", ["a small red circle", "a big blue square"]),
        ("A group of people wait in front of a fire truck.", ["a group of people", "a fire truck"]),
        ("a man cleaning a window", ["a man", "a window"]),
        ("mike is kicking the soccer ball towards jenny", ["mike", "the soccer ball", "jenny"]),
        ("A black and white dog", ["a black and white dog"]),
        ("the man 's hat", ["the man", "hat"]),
        ("There are clouds above the ocean", ["clouds", "the ocean"]),
    ],
)  # fmt: skip
def test_phrases(caption: str, expected: list[str]) -> None:
    assert phrases(caption) == expected


def test_a_caption_is_written_again_as_it_was() -> None:
    caption = "Two  men's hats (red , blue)  at 6:55 ."
    assert "".join(token.gap + token.text for token in parse(caption).tokens) == caption


def test_predicates_are_attributes_of_what_they_are_said_of() -> None:
    parsed = parse("the dog is brown and the cat is very small")
    said = {parsed.tokens[i].lower: parsed.phrases[owner].head for i, owner in parsed.predicates}
    assert said == {"brown": "dog", "small": "cat"}


def test_senses_follow_the_determiner() -> None:
    game, ball = parse("a man plays football"), parse("a man throws a football")
    assert [p.sense and p.sense.group for p in game.phrases] == ["adults", "games"]
    assert [p.sense and p.sense.group for p in ball.phrases] == ["adults", "balls"]


def test_number() -> None:
    parsed = parse("two sheep and a woman with scissors")
    assert [p.plural for p in parsed.phrases] == [True, False, True]


@pytest.mark.parametrize("caption", ["", ".", "!!!", "犬 と 猫", "'s", "a", "THE DOG", "- - -"])
def test_anything_can_be_parsed(caption: str) -> None:
    parse(caption)
