from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from random import Random

import pytest

from clipkit.data.world.scene import (
    COLOURS,
    CONVERSE,
    KINDS,
    RADIUS,
    SHAPES,
    Thing,
    novel,
    relation,
    reserved,
    sample_scene,
    sample_training_scene,
    scene_from_json,
)


@pytest.mark.parametrize("kind", KINDS)
def test_things_stand_apart_and_inside(kind: str) -> None:
    rng = Random(0)
    for _ in range(300):
        scene = sample_scene(rng, kind)
        for thing in scene.things:
            reach = RADIUS[thing.size] - 0.01
            assert reach < thing.x < 1 - reach and reach < thing.y < 1 - reach
        for a, b in combinations(scene.things, 2):
            assert math.dist((a.x, a.y), (b.x, b.y)) > 0.95 * (RADIUS[a.size] + RADIUS[b.size])


def test_pairs_always_have_a_clear_relation_and_its_converse() -> None:
    rng = Random(1)
    seen = Counter()
    for _ in range(800):
        a, b = sample_scene(rng, "pair").things
        where = relation(a, b)
        assert where is not None and relation(b, a) == CONVERSE[where]
        assert a.name != b.name
        seen[where] += 1
    assert min(seen.values()) > 150


def test_triples_have_three_different_things_and_some_relation() -> None:
    rng = Random(2)
    for _ in range(200):
        things = sample_scene(rng, "triple").things
        assert len({t.name for t in things}) == 3
        assert any(relation(a, b) for a, b in combinations(things, 2))


def test_groups_count_one_to_four_of_a_kind() -> None:
    rng = Random(3)
    counts = Counter(len(sample_scene(rng, "group").things) for _ in range(400))
    assert sorted(counts) == [1, 2, 3, 4] and min(counts.values()) > 60


def test_training_never_holds_a_reserved_pair() -> None:
    looks = [Thing(s, c, "small", "solid", 0, 0) for s in SHAPES for c in COLOURS]
    pairs = list(combinations(looks, 2))
    assert 0.07 < sum(reserved(a, b) for a, b in pairs) / len(pairs) < 0.13
    rng = Random(4)
    assert not any(novel(sample_training_scene(rng)) for _ in range(500))
    assert any(novel(sample_scene(rng)) for _ in range(100))


def test_scenes_survive_json() -> None:
    scene = sample_scene(Random(5), "triple")
    assert scene_from_json(scene.to_json()) == scene
