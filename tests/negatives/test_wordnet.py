"""Nouns beyond the lists, by a miniature of WordNet's files."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from clipkit.negatives.filters import Case, reason_to_drop
from clipkit.negatives.wordnet import FOLDER, WordNet, installed, replace_nouns_wordnet

# name: (lexicographer file, words, hypernym)
SYNSETS = {
    "tool": ("06", ["tool"], ""),
    "awl": ("06", ["awl", "bodkin"], "tool"),
    "adze": ("06", ["adze"], "tool"),
    "rasp": ("06", ["rasp", "wood_file"], "tool"),
    "zarf": ("06", ["zarf"], "tool"),
    "brad": ("06", ["Brad"], "tool"),
    "gimlet": ("06", ["gimlet"], "awl"),
    "virtue": ("07", ["virtue"], ""),
    "pity": ("07", ["pity"], "virtue"),
}
UNTAGGED = {"zarf"}


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WordNet:
    """Written twice: once with offsets of no meaning, to learn the true ones, which are of the same length."""
    offsets = dict.fromkeys(SYNSETS, 0)
    for _ in range(2):
        data, at = "", {}
        for name, (file, words, above) in SYNSETS.items():
            at[name] = len(data)
            pointers = [("@", above)] if above else []
            pointers += [("~", other) for other, (_, _, up) in SYNSETS.items() if up == name]
            named = " ".join(f"{word} 0" for word in words)
            pointed = " ".join(f"{kind} {offsets[other]:08} n 0000" for kind, other in pointers)
            data += f"{at[name]:08} {file} n {len(words):02x} {named} {len(pointers):03} {pointed} | gloss  \n"
        offsets = at
    lines = ["  1 licence"]
    for name, (_, words, _) in SYNSETS.items():
        tagged = 0 if name in UNTAGGED else 1
        lines += [f"{word.lower()} n 1 1 @ 1 {tagged} {offsets[name]:08}  " for word in words]
    (tmp_path / "data.noun").write_text(data)
    (tmp_path / "index.noun").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    found = installed()
    assert found is not None
    return found


def test_sisters_are_common_words_of_one_kind(wordnet: WordNet) -> None:
    assert set(wordnet.sisters("awl")) == {"adze", "rasp"}  # not its synonym, its child, a rare word, a name, a phrase
    assert set(wordnet.sisters("adze")) == {"awl", "bodkin", "rasp"}
    assert not list(wordnet.sisters("pity")) and not list(wordnet.sisters("unheard"))
    assert wordnet.kin("awl") == {"awl", "bodkin", "tool", "gimlet"}


def test_a_noun_beyond_the_lists_is_replaced(wordnet: WordNet) -> None:
    caption = "A man holds an awl next to two rasps ."
    texts = {text for seed in range(8) for text in replace_nouns_wordnet(caption, Random(seed))}
    assert texts == {
        "A man holds an adze next to two rasps .",
        "A man holds an awl next to two adzes .",
        "A man holds an awl next to two bodkins .",
    }
    assert not any(reason_to_drop(Case(text, caption, "replace_nouns_wordnet")) for text in texts)
    assert replace_nouns_wordnet("a dog on a sofa", Random(0)).reason.startswith("no noun beyond the lists")


def test_without_wordnet_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    found = replace_nouns_wordnet("a man holds an awl", Random(0))
    assert not list(found) and "wordnet-base" in found.reason


def test_profanity_neither_comes_nor_goes() -> None:
    for caption, text in (("a damn red dog", "a red dog runs"), ("a red dog", "a damn blue dog")):
        assert reason_to_drop(Case(text, caption, "negative")) == "profanity changed"
    assert not reason_to_drop(Case("a damn blue dog", "a damn red dog", "replace_adjectives"))
