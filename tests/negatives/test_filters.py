from __future__ import annotations

from collections import Counter

import pytest

from clipkit.negatives.filters import Case, keep, reason_to_drop, usage_of


@pytest.mark.parametrize(
    ("text", "caption", "kind", "siblings", "reason"),
    [
        ("a cat sits", "a dog sits", "replace_nouns", (), ""),
        ("A dog sits .", "a dog sits", "replace_nouns", (), "identical"),
        ("a cat sits", "a dog sits", "replace_nouns", ("A cat sits!",), "another caption of the picture"),
        ("cat", "a dog", "replace_nouns", (), "too short"),
        ("a cat " + "very " * 9 + "small", "a dog sits", "replace_nouns", (), "too long"),
        ("a puppy sits", "a dog sits", "replace_nouns", (), "only synonyms replaced"),
        ("dogs sit here", "a dog sits here", "swap_nouns", (), "words changed"),
        ("an apple near a dog", "a dog near an apple", "swap_nouns", (), ""),
        ("a cat chases two dogs", "a dog chases two cats", "swap_nouns", (), ""),
        ("a red red dog", "a red brown dog", "replace_adjectives", (), "repeated word"),
        ("a orange sits", "a dog sits", "replace_nouns", (), "wrong article"),
        ("a woman on a bench", "a man on a bench", "replace_nouns", ("a lady on a bench",), "another caption says so"),
        ("a woman on a bench", "a man on a bench", "replace_nouns", ("a man and a woman on a bench",), ""),
        ("a woman on a bench", "a man on a bench", "replace_nouns", ("a woman far away",), ""),
        ("a cat sits", "a dog sits", "permute_concepts", (), "words changed"),
        ("a cat sits", "a dog sits", "add_attributes", (), "words lost"),
        ("a red dog sits", "a dog sits", "add_attributes", (), ""),
        ("a red dog sits", "a dog sits", "add_attributes", ("the red dog",), "another caption says so"),
        ("a cat left of a dog", "a cat right of a dog", "replace_relations", ("the cat left of the dog",),
         "another caption says so"),
        ("a cat left of a dog", "a cat right of a dog", "replace_relations", ("a dog left of a cat",), ""),
    ],
)  # fmt: skip
def test_reasons(text: str, caption: str, kind: str, siblings: tuple[str, ...], reason: str) -> None:
    assert reason_to_drop(Case(text, caption, kind, siblings)) == reason


def test_no_substring_accidents() -> None:
    assert reason_to_drop(Case("a woman runs", "a man runs", "replace_nouns")) == ""


def test_keep_counts_every_drop_and_stops_at_the_limit() -> None:
    drops: Counter[str] = Counter()
    taken = {"a horse sits"}
    texts = ["A horse sits.", "a dog sits", "a cat sits", "a cat sits .", "a cow sits"]
    kept = keep(texts, "a dog sits", "replace_nouns", limit=1, taken=taken, drops=drops)
    assert kept == ["a cat sits"]
    assert drops == {"duplicate": 1, "identical": 1}
    more = keep(texts, "a dog sits", "replace_nouns", limit=5, taken=taken, drops=drops)
    assert more == ["a cow sits"]
    assert drops == {"duplicate": 4, "identical": 2}


def test_usage_tells_what_gives_itself_away() -> None:
    captions = [
        "a cat under a bed",
        "a dog under a bed",
        "a dog on a bed",
        "a dog on a bed",
        "a cat under a cat under a",
    ]
    usage = usage_of(captions, 2)
    assert usage.pairs == {
        ("a", "cat"),
        ("cat", "under"),
        ("under", "a"),
        ("a", "bed"),
        ("a", "dog"),
        ("dog", "on"),
        ("on", "a"),
    }
    assert usage.mark == usage_of(reversed(captions), 2).mark != usage_of(captions, 1).mark
    for text, kind, reason in (
        ("a cat under a bed", "replace_relations", ""),
        ("a cat beneath a bed", "replace_relations", "unusual neighbours"),
        ("a dog under a bed", "swap_nouns", "words changed"),
        ("bed a on a cat", "reshuffle", ""),
    ):
        assert reason_to_drop(Case(text, "a cat on a bed", kind, usage=usage)) == reason
    # What the caption itself says is never unusual.
    assert reason_to_drop(Case("an odd cat", "an odd dog", "replace_nouns", usage=usage)) == "unusual neighbours"
    assert (
        reason_to_drop(Case("a cat, an odd dog", "a dog, an odd cat", "swap_nouns", usage=usage))
        == "unusual neighbours"
    )
    assert reason_to_drop(Case("an odd cat under a bed", "an odd cat on a bed", "replace_relations", usage=usage)) == ""
