"""Nouns beyond the lists, placed in them by a miniature of WordNet's files."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from clipkit.negatives.filters import Case, reason_to_drop
from clipkit.negatives.lexicon import lexicon
from clipkit.negatives.wordnet import FOLDER, WordNet, installed, replace_nouns_wordnet

# name: (lexicographer file, words, hypernym)
SYNSETS = {
    "headdress": ("06", ["headdress"], ""),
    "hat": ("06", ["hat", "chapeau"], "headdress"),
    "bonnet": ("06", ["bonnet", "poke_bonnet"], "hat"),
    "mask": ("06", ["mask", "bonnet"], ""),
    "wagon": ("06", ["wagon"], ""),
    "cart": ("06", ["cart"], "wagon"),
    "golf cart": ("06", ["golf_cart"], ""),
    "hoodlum": ("18", ["hood"], ""),
    "punk": ("18", ["punk"], "hoodlum"),
    "wood": ("20", ["wood"], ""),
    "bone": ("08", ["bone"], ""),
    "jaw": ("08", ["jaw"], "bone"),
    "shore": ("17", ["bank"], "mountain"),
    "bench": ("06", ["bank"], "mountain"),
    "mountain": ("17", ["mountain"], ""),
}
USES = {"bonnet": [9, 1], "bank": [5, 4]}


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WordNet:
    """Written twice: once with offsets of no meaning, to learn the true ones, which are of the same length."""
    offsets = dict.fromkeys(SYNSETS, 0)
    for _ in range(2):
        data, at = "", {}
        for name, (file, words, above) in SYNSETS.items():
            at[name] = len(data)
            named = " ".join(f"{word} 0" for word in words)
            pointed = f"001 @ {offsets[above]:08} n 0000" if above else "000"
            data += f"{at[name]:08} {file} n {len(words):02x} {named} {pointed} | gloss  \n"
        offsets = at
    senses: dict[str, list[str]] = {}
    for name, (_, words, _) in SYNSETS.items():
        for word in words:
            senses.setdefault(word, []).append(f"{offsets[name]:08}")
    lines = [f"{word} n {len(of)} 1 @ {len(of)} 0 {' '.join(of)}  " for word, of in senses.items()]
    uses = [f"{word}%1:06:0{i}:: {i + 1} {n}" for word, counts in USES.items() for i, n in enumerate(counts)]
    (tmp_path / "data.noun").write_text(data)
    (tmp_path / "index.noun").write_text("\n".join(["  1 licence", *lines]) + "\n")
    (tmp_path / "cntlist.rev").write_text("\n".join([*uses, "bank%2:40:00:: 1 90"]) + "\n")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    found = installed()
    assert found is not None
    return found


def test_a_noun_takes_the_place_of_the_listed_one_above_it(wordnet: WordNet) -> None:
    assert [noun.lemma for noun in wordnet.places("bonnet")] == ["hat"]
    hat = wordnet.places("bonnet")[0]
    offered = {noun.lemma for noun in lexicon().nouns.offers(hat)}
    assert {noun.lemma for noun in wordnet.offers("bonnet")} == offered - {"mask"}  # "bonnet" may mean one
    assert "helmet" in offered


def test_no_place_where_the_sense_is_in_doubt(wordnet: WordNet) -> None:
    assert not wordnet.places("bank")  # two senses, nearly as common
    assert not wordnet.places("punk")  # the listed hood is worn
    assert not wordnet.places("jaw")  # the listed bone is a toy
    assert not wordnet.places("unheard")


def test_what_a_word_may_name_is_not_offered(wordnet: WordNet) -> None:
    offered = {noun.lemma for noun in wordnet.offers("cart")}
    assert "bicycle" in offered and not {"golf cart", "shopping cart"} & offered


def test_a_noun_beyond_the_lists_is_replaced(wordnet: WordNet) -> None:
    caption = "An old woman wears a bonnet next to two carts ."
    texts = {text for seed in range(40) for text in replace_nouns_wordnet(caption, Random(seed))}
    assert "An old woman wears a helmet next to two carts ." in texts
    assert "An old woman wears a bonnet next to two bicycles ." in texts
    assert not any(reason_to_drop(Case(text, caption, "replace_nouns_wordnet")) for text in texts)
    assert replace_nouns_wordnet("a dog on a sofa", Random(0)).reason.startswith("no noun beyond the lists")
    assert not list(replace_nouns_wordnet("seen through bonnet", Random(0)))  # a mass, perhaps


def test_without_wordnet_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    found = replace_nouns_wordnet("a man holds an awl", Random(0))
    assert not list(found) and "wordnet-base" in found.reason


def test_profanity_neither_comes_nor_goes() -> None:
    for caption, text in (("a damn red dog", "a red dog runs"), ("a red dog", "a damn blue dog")):
        assert reason_to_drop(Case(text, caption, "negative")) == "profanity changed"
    assert not reason_to_drop(Case("a damn blue dog", "a damn red dog", "replace_adjectives"))
