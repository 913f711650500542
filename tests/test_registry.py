from __future__ import annotations

import pytest

from clipkit.errors import UserError, did_you_mean
from clipkit.registry import RULES, SCORES, SOURCES, TERMS, Registry, settings_of


def filled() -> Registry:
    registry = Registry("thing", ())

    @registry.register(needs="negative_text")
    def near(z: object, *, width: float = 0.5, kind: str = "a") -> float:
        """First line.

        More.
        """
        return width

    @registry.register(name="other", needs=("teacher", "bias"))
    class Stateful:
        def __init__(self, *, size: int = 3):
            self.size = size

    return registry


def test_an_entry_knows_its_settings_needs_and_summary() -> None:
    entry = filled().entry("near")
    assert {name: p.default for name, p in entry.settings.items()} == {"width": 0.5, "kind": "a"}
    assert entry.settings["width"].annotation is float
    assert entry.needs == ("negative_text",)
    assert entry.summary == "First line."


def test_a_class_is_registered_by_its_constructor() -> None:
    registry = filled()
    entry = registry.entry("other")
    assert list(entry.settings) == ["size"] and entry.needs == ("teacher", "bias")
    assert registry["other"](size=4).size == 4


def test_it_is_a_sorted_mapping() -> None:
    registry = filled()
    assert list(registry) == ["near", "other"] and len(registry) == 2 and "near" in registry


def test_an_unknown_name_is_a_users_mistake_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"no thing called neer; did you mean near\?"):
        filled().entry("neer")


def test_registering_twice_is_ours() -> None:
    registry = filled()
    with pytest.raises(AssertionError, match="near is registered twice"):
        registry.register(name="near")(lambda z: z)


def test_modules_are_imported_on_first_use_only() -> None:
    registry = Registry("thing", ("no_such_module_anywhere",))
    with pytest.raises(ModuleNotFoundError):
        len(registry)


def test_only_keyword_arguments_are_settings() -> None:
    def function(a: int, b: int = 1, *rest: int, c: int = 2, **more: int) -> None: ...

    assert list(settings_of(function)) == ["c"]


@pytest.mark.parametrize(
    ("registry", "some"),
    [
        (TERMS, {"infonce", "igc", "tgc", "distill", "siglip"}),
        (RULES, {"reshuffle", "swap_nouns", "swap_adjectives", "replace_adjectives", "replace_nouns"}),
        (SOURCES, {"abstract_scenes"}),
        (SCORES, set()),
    ],
    ids=["terms", "rules", "sources", "scores"],
)
def test_the_registries_fill_themselves(registry: Registry, some: set[str]) -> None:
    assert set(registry) >= some and len(registry) > 0
    for name in registry:
        assert registry.entry(name).summary, f"{registry.kind} {name} has no docstring"


def test_nearest_name_or_all_of_them() -> None:
    assert did_you_mean("infonse", ["infonce", "igc"]) == "; did you mean infonce?"
    assert did_you_mean("zzz", ["b", "a"]) == "; valid names: a, b"
    assert did_you_mean("zzz", []) == ""
