"""Token ids equal open_clip's, cut to the longest; the caches are bounded."""

from __future__ import annotations

import pickle
import random

import open_clip
import pytest
import torch

from clipkit.data import tokenize
from clipkit.data.tokenize import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def texts() -> list[str]:
    rng = random.Random(0)
    words = ["a", "dog's", "Äpfel", "naïve", "12.5%", "日本", "&amp;", "don't", "x" * 300, "🙂", "<end_of_text>", "\n"]
    return ["", " ", "A photo of a cat."] + [" ".join(rng.choices(words, k=rng.randint(1, 90))) for _ in range(200)]


def test_equal_to_open_clip(tokenizer: Tokenizer) -> None:
    reference = open_clip.SimpleTokenizer()(texts())
    found = tokenizer(texts())
    width = found.shape[1]
    assert torch.equal(found, reference[:, :width]) and not reference[:, width:].any()


def test_cut_to_the_longest_of_the_call(tokenizer: Tokenizer) -> None:
    assert tokenizer(["a", "a b c"]).shape == (2, 5) and tokenizer(["a"]).shape == (1, 3)
    assert Tokenizer(trim=False)(["a"]).shape == (1, 77)
    assert tokenizer([]).shape[0] == 0


def test_a_long_text_keeps_its_end_mark() -> None:
    short = Tokenizer(context_length=8)
    found = short(["a " * 50])
    assert torch.equal(found, open_clip.SimpleTokenizer()(["a " * 50], context_length=8))


def test_named_tokenizers_and_pickling(tokenizer: Tokenizer) -> None:
    named = pickle.loads(pickle.dumps(Tokenizer("ViT-B-32", context_length=20, trim=False)))
    assert (named.name, named.context_length, named.trim) == ("ViT-B-32", 20, False)
    assert torch.equal(named(["two dogs"])[:, :4], tokenizer(["two dogs"]))


def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "CACHED_WORDS", 20)
    small = Tokenizer()
    before = small(["<start_of_text> one <end_of_text>"])
    small([f"word{i}x{i}" for i in range(200)])
    assert len(small._words) <= 20 and len(small._inner.cache) <= 100
    assert torch.equal(small(["<start_of_text> one <end_of_text>"]), before)


def test_fuzz_against_open_clip(tokenizer: Tokenizer) -> None:
    """40,000 strings: letters of many scripts, entities, marks, control and surrogate-free odd characters."""
    rng = random.Random(1)
    pools = [
        [chr(c) for c in range(32, 127)],
        [chr(c) for c in (*range(0, 32), *range(127, 592), 0x2018, 0x2019, 0x201C, 0x2028, 0x3000, 0xFB01, 0xFF21)],
        [chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(3000)],
        ["&amp;", "&lt;", "&#39;", "'s", "'LL", " ", "  ", "<start_of_text>", "<END_OF_TEXT>", "\x1b[31m", "Ã©", "â€™"],
        ["a", "the", "Dog", "running", "12", "3.5", "don't", "t-shirt", "U.S.", "...", "é", "ß", "İ", "ſ", "ﬁ"],
    ]
    strings = ["".join(rng.choices(rng.choice(pools), k=rng.randint(0, 24))) for _ in range(20_000)]
    strings += [rng.choice(("", " ")).join(rng.choice(rng.choice(pools)) for _ in range(12)) for _ in range(20_000)]
    reference = open_clip.SimpleTokenizer()(strings)
    found = Tokenizer(trim=False)(strings)
    different = (found != reference).any(1).nonzero().flatten().tolist()
    assert [strings[i] for i in different] == []
