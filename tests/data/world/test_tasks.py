from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from clipkit.data.world.scene import sample_scene
from clipkit.data.world.tasks import TASKS, Row, make_row

ROWS = 240
FORMS = {"choice_1x4": "1x4", "order": "1x5", "winoground": "2x2", "t2i_choice": "2x1"}
SAME_WORDS = ("swap_object", "swap_attribute", "choice_1x4", "winoground", "order")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    rng = Random(7)
    made: dict[str, list[Row]] = {category: [] for category in TASKS}
    for category, (kinds, _) in TASKS.items():
        while len(made[category]) < ROWS:
            row = make_row(category, sample_scene(rng, rng.choice(kinds)), rng)
            made[category] += [row] if row else []
    return made


@pytest.mark.parametrize("category", TASKS)
def test_right_texts_are_true_and_wrong_ones_false(category: str, rows: dict[str, list[Row]], oracle: Callable) -> None:
    for row in rows[category]:
        assert row.category == category and row.form == row.meta["form"] == FORMS.get(category, "1x2")
        assert len({*row.texts}) == len(row.texts) and len({*row.scenes}) == len(row.scenes)
        for scene, line in zip(row.scenes, row.match):
            for text, expected in zip(row.texts, line):
                verdict = oracle(text, scene.to_json())
                if category == "order":  # most perturbed orders are no sentence at all
                    assert bool(verdict) == bool(expected), (text, scene)
                else:
                    assert verdict is bool(expected), (text, scene)


@pytest.mark.parametrize("category", TASKS)
def test_the_right_answer_has_no_place_of_its_own(category: str, rows: dict[str, list[Row]]) -> None:
    places = Counter(str(row.match) for row in rows[category])
    possible = {"1x2": 2, "1x4": 4, "1x5": 5, "2x2": 2, "2x1": 2}[rows[category][0].form]
    assert len(places) == possible
    assert min(places.values()) > 0.6 * ROWS / possible


@pytest.mark.parametrize("category", [c for c in TASKS if c not in ("t2i_choice", "winoground")])
def test_length_tells_nothing(category: str, rows: dict[str, list[Row]]) -> None:
    """Shorter is right, ties shared: chance, but for the two add categories, where the addition is the error."""
    right = chance = 0.0
    for row in rows[category]:
        shortest = min(map(len, row.texts))
        tied = [bool(hit) for text, hit in zip(row.texts, row.match[0]) if len(text) == shortest]
        right += sum(tied) / len(tied) / ROWS
        chance += 1 / len(row.texts) / ROWS
    if category.startswith("add_"):
        assert right == pytest.approx(1.0)
    else:
        assert abs(right - chance) < 0.09


@pytest.mark.parametrize("category", SAME_WORDS)
def test_a_bag_of_words_cannot_choose(category: str, rows: dict[str, list[Row]]) -> None:
    for row in rows[category]:
        bags = [Counter("a" if w == "an" else w for w in text.split()) for text in row.texts]
        assert all(bag == bags[0] for bag in bags), row.texts


def test_meta_says_what_was_changed(rows: dict[str, list[Row]]) -> None:
    def variety(category: str) -> int:
        return len({str({**r.meta, "form": "", "novel": ""}) for r in rows[category]})

    assert variety("replace_attribute") == variety("add_attribute") == variety("existence") == 3
    assert (variety("t2i_choice"), variety("winoground"), variety("counting")) == (4, 2, 12)
    assert any(row.meta["novel"] for row in rows["swap_object"])
