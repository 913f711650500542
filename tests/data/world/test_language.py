from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from clipkit.data.world.language import Claim, Mention, article, captions, plural, sample_style, vocabulary, word
from clipkit.data.world.scene import KINDS, Scene, Thing, sample_scene, sample_training_scene

RED_CIRCLE = Thing("circle", "red", "small", "striped", 0.2, 0.5)
BLUE_STAR = Thing("star", "blue", "large", "solid", 0.8, 0.5)
SCENE = Scene("pair", "white", (RED_CIRCLE, BLUE_STAR))
CIRCLE, STAR = Mention("circle", ("red",)), Mention("star", ("blue",))


@pytest.mark.parametrize("kind", KINDS)
def test_every_caption_is_true(kind: str, oracle: Callable) -> None:
    rng = Random(0)
    for _ in range(250):
        scene = sample_scene(rng, kind)
        texts = captions(scene, rng)
        assert 2 <= len(texts) <= 4 and len({*texts}) == len(texts)
        for text in texts:
            assert oracle(text, scene.to_json()), (text, scene)


def test_claims_hold_only_when_true() -> None:
    def says(*mentions: Mention, relation: str | None = None, background: str | None = None) -> bool:
        return Claim(mentions, relation, background).holds(SCENE)

    assert says(CIRCLE, STAR, relation="left") and not says(CIRCLE, STAR, relation="right")
    assert says(STAR, CIRCLE, relation="right") and not says(STAR, CIRCLE, relation="above")
    assert not says(Mention("circle", ("blue",)), Mention("star", ("red",)))
    assert says(Mention("shape", ("striped",))) and not says(Mention("star", ("striped",)))
    assert says(Mention("heart", count=0)) and not says(Mention("star", count=0))
    assert says(Mention("star", count=1)) and not says(Mention("star", count=2))
    assert says(Mention("shape", count=2)) and not says(CIRCLE, CIRCLE)
    assert says(CIRCLE, background="white") and not says(CIRCLE, background="black")


def test_turning_a_claim_keeps_its_truth() -> None:
    claim = Claim((CIRCLE, STAR), "left")
    assert claim.turned() == Claim((STAR, CIRCLE), "right") and claim.turned().holds(SCENE)


def test_articles_and_plurals() -> None:
    assert [article(w) for w in ("orange star", "red star")] == ["an", "a"]
    assert [plural(w) for w in ("cross", "star")] == ["crosses", "stars"]
    rng = Random(1)
    three = Claim((Mention("cross", ("orange",), 3),))
    texts = {word(three, sample_style(rng)) for _ in range(50)}
    assert "there are three orange crosses" in texts
    assert {word(Claim((Mention("cross", ("orange",)),)), sample_style(rng)) for _ in range(90)} >= {
        "an orange cross",
        "the orange cross",
        "there is an orange cross",
    }


def test_wordings_of_one_claim_name_either_thing_first() -> None:
    rng = Random(2)
    texts = {word(Claim((CIRCLE, STAR), "left"), sample_style(rng)) for _ in range(300)}
    assert {
        "a red circle to the left of a blue star",
        "a red circle is left of a blue star",
        "a picture of a red circle left of a blue star",
        "to the left of a blue star is a red circle",
        "a blue star with a red circle to its left",
    } <= texts


def test_the_order_of_words_does_not_tell_the_place() -> None:
    rng = Random(3)
    first_is_left = Counter()
    for _ in range(600):
        scene = sample_training_scene(rng)
        if scene.kind != "pair" or len({t.shape for t in scene.things}) < 2:
            continue
        a, b = sorted(scene.things, key=lambda t: (t.x, t.y))
        if abs(a.x - b.x) < 0.3:
            continue
        for text in captions(scene, rng):
            if a.shape in text and b.shape in text:
                first_is_left[text.index(a.shape) < text.index(b.shape)] += 1
    assert 0.44 < first_is_left[True] / first_is_left.total() < 0.56


def test_vocabulary_covers_the_captions() -> None:
    words = vocabulary()
    assert words["nouns"]["cross"] == "crosses"
    assert set(words["adjectives"]) == {"size", "texture", "colour", "background"}
