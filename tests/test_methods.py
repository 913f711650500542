"""The document of methods says what the configs and docstrings say, of every one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clipkit import methods, sweep
from clipkit.registry import TERMS
from tests.typed import well

DOCS = Path(__file__).parent.parent / "docs"


def test_the_document_is_up_to_date():
    found, measured = [methods.method(name) for name in methods.every()], sweep.read(DOCS / "measured.json")
    same = (DOCS / "methods.md").read_text() == methods.markdown(found, sweep.markdown(measured))
    assert same, "clipkit methods --markdown --sweep docs/measured.json > docs/methods.md"


def test_what_was_measured_are_methods():
    measured = sweep.read(DOCS / "measured.json")["methods"]
    assert measured.keys() <= set(methods.every())
    assert all(found["runs"] for found in measured.values())


def test_every_term_belongs_to_a_method():
    used = {term for name in methods.every() for term in methods.method(name).config.objective}
    assert used == set(TERMS)


@pytest.mark.parametrize("name", methods.every())
def test_a_config_says_what_it_is(name: str):
    found = methods.method(name)
    assert re.search(r"arXiv \d{4}\.\d{4,5}", found.title), found.title
    assert found.about.endswith(".") and found.reports and found.cost


def test_needs_are_those_of_terms_data_and_model():
    assert methods.method("clip").needs == []
    assert methods.method("degla").needs == ["negative captions", "a teacher"]
    assert methods.method("triplet_clip").needs == ["negative captions", "pictures of negatives"]
    assert methods.method("one_to_k").needs == ["several captions a picture"]
    assert methods.method("gist").needs == ["a frozen teacher"]
    assert methods.method("cwcl").needs == ["a locked image tower"]
    assert methods.method("siglip").needs == ["a learned bias"]


def test_runs_on_given_data_are_no_methods():
    assert not {"world_degla", "flickr8k_clip", "abstract_scenes_start", "debug", "world_sweep"} & set(methods.every())


def test_methods_are_listed() -> None:
    rows = dict(line.split("\t", 1) for line in well("methods").splitlines()[1:])
    assert rows["degla"] == "DeGLA, arXiv 2504.16801\tnegative captions, a teacher"
    found = {one["name"]: one for one in json.loads(well("methods", "--json", "-"))}
    assert found.keys() == rows.keys() and found["siglip"]["config"]["model"]["bias"] == -10
    assert well("methods", "--markdown").startswith("# Methods\n")
