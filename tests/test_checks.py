"""Combinations of settings: teachers, stored features, and what the terms look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipkit import config as configuration
from clipkit.checks import teacher_roles
from clipkit.errors import UserError

EMA = {"kind": "ema"}
BOTH = ("image", "text", "negative_text")


@pytest.mark.parametrize(
    ("objective", "teacher", "expected"),
    [
        ({"tgc": {}}, EMA, ("text",)),
        ({"tgc": {}, "distill": {}}, EMA, BOTH),
        ({"gist": {}}, {"kind": "frozen"}, BOTH),
        ({"structure": {}}, EMA, ("image", "text")),
        ({"distill": {}}, EMA | {"towers": "text"}, ("text", "negative_text")),
        ({"distill": {}, "structure": {}}, EMA | {"towers": "image"}, ("image",)),
        ({"infonce": {}}, EMA, ()),
    ],
)
def test_the_teacher_encodes_what_the_terms_look_at(objective: dict, teacher: dict, expected: tuple[str, ...]) -> None:
    config = configuration.validate({"objective": objective, "teacher": teacher, "data": {"negatives": 1}})
    assert teacher_roles(config) == expected


STORED = {"teacher_features": "clip"}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (
            {"teacher": EMA | {"half_life": 0.2, "half_life_samples": 10}},
            "teacher.half_life_samples: stands instead of teacher.half_life, both are given",
        ),
        (
            {"teacher": {"kind": "frozen", "warmup": 10}},
            "teacher.warmup: belongs to teacher.kind: ema, got frozen",
        ),
        ({"teacher": EMA | {"start": "x"}}, "teacher.start: belongs to teacher.kind: frozen, got ema"),
        (
            {"objective": {"tgc": {}}, "teacher": EMA | {"towers": "image"}, "data": {"negatives": 1}},
            "objective.tgc needs the teacher's text; teacher.towers is image",
        ),
        (
            {"objective": {"gist": {}}, "teacher": {"kind": "frozen", "towers": "text"}},
            "objective.gist needs the teacher's image; teacher.towers is text",
        ),
        ({"teacher": EMA | {"towers": "text"}}, "teacher.towers: text, but no term of the objective looks at it"),
        (
            {"teacher": {"kind": "precomputed"}},
            "teacher.kind: precomputed and data.teacher_features (the set it reads) belong together",
        ),
        (
            {"teacher": EMA, "data": STORED},
            "teacher.kind: precomputed and data.teacher_features (the set it reads) belong together",
        ),
        (
            {
                "objective": {"distill": {}},
                "teacher": {"kind": "frozen", "start": "x"},
                "model": {"lock_image": True},
                "data": {"cache_image_features": True, "augment": "none"},
            },
            "teacher.start: this teacher needs the pictures; switch data.cache_image_features off",
        ),
        (
            {"model": {"text": {"features": 8}}},
            "model.text.features (a width) and data.text_features (a set in the shards) belong together",
        ),
        (
            {"model": {"text": {"features": 8, "heads": 2}}, "data": {"text_features": "llm"}},
            "model.text.heads: belongs to a transformer on tokens; with features there is only layers",
        ),
        ({"model": {"text": {"embedder": "x"}}}, "model.text.embedder: belongs to model.text.features"),
        ({"objective": {"paraphrase": {}}}, "objective.paraphrase needs data.positives ≥ 1, got 0"),
    ],
)  # fmt: skip
def test_combinations_that_cannot_be_right(tree: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        configuration.validate(tree)
    assert str(raised.value).splitlines() == ["config:", f"  {expected}"]


@pytest.mark.parametrize(
    "place", ["runs/{nme}", "runs/{", "runs/{}", "runs/{array}", "{name.x}", "{name[x]}", "{name:q}"]
)
def test_only_name_and_seed_are_filled_in(place: str) -> None:
    for setting in ("out", "mirror"):
        with pytest.raises(UserError) as raised:
            configuration.validate({setting: place})
        expected = (
            f'{setting}: may hold {{name}} and {{seed}} only (other braces are written {{{{ and }}}}), got "{place}"'
        )
        assert str(raised.value).splitlines() == ["config:", f"  {expected}"]
    config = configuration.validate({"out": "{name}/{seed:03d}{{}}", "mirror": "s3://x/{name}", "name": "a", "seed": 5})
    assert (str(config.run_folder), config.mirror_url) == ("a/005{}", "s3://x/a")


def test_a_mirror_lies_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("runs")
    own = ["runs/{name}/checkpoints", "runs/{name}", ".", "runs/run/checkpoints/x/../y", "link/run/checkpoints/"]
    own += [f"file://{tmp_path}/runs/run/checkpoints", f"local://{tmp_path}/runs", "file:runs", "~/runs"]
    for mirror in own:
        with pytest.raises(
            UserError, match="mirror: .* is, holds or lies in the run's own checkpoints, .*; copies belong"
        ):
            configuration.validate({"mirror": mirror})
    for mirror in ("", "runs/{name}/copies", "runs/other", f"file://{tmp_path}/mirror", "s3://runs/{name}/checkpoints"):
        configuration.validate({"mirror": mirror})


def test_a_set_is_a_plain_name() -> None:
    with pytest.raises(UserError, match=r"data\.text_features: String should match pattern"):
        configuration.validate({"data": {"text_features": "../x"}})


def test_a_dumped_config_is_accepted_again(tmp_path) -> None:
    """All settings are written out in it, the unused ones too."""
    for teacher in (EMA | {"half_life_samples": 7}, EMA | {"half_life": 0.5, "warmup": 4}, {"kind": "frozen"}):
        config = configuration.validate({"teacher": teacher, "model": {"text": {"width": 64}}})
        (tmp_path / "x.yaml").write_text(configuration.dump(config))
        assert configuration.load(tmp_path / "x.yaml") == config
