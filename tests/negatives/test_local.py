"""A model of transformers that is run here: tiny, random, and asked as a server is."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.data.build import Sample, write_shard
from clipkit.errors import UserError
from clipkit.negatives.local import LocalChat, _Dice
from tests.typed import run, wrong

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of a few thousand weights that reads single letters, saved as transformers saves."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted({chr(c) for c in range(32, 127)} | {"\n"})
    vocabulary = {letter: i for i, letter in enumerate(["<end>", "<unknown>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    path = tmp_path_factory.mktemp("model")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary), n_positions=4096, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_answers_depend_on_prompt_and_seed_alone(folder: Path) -> None:
    chat = LocalChat.load(str(folder), batch=8)
    asked = [(text, seed) for text in ("a dog", "two red cats on a mat") for seed in (0, 1, 2)]
    alone = [chat.ask(text, "k", seed=seed, max_tokens=12) for text, seed in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda q: chat.ask(q[0], "k", seed=q[1], max_tokens=12), asked))
    assert [reply.content for reply in alone] == [reply.content for reply in together]
    assert len({reply.content for reply in alone}) == 6
    for (text, _), reply in zip(asked, alone):
        assert reply.tokens[0] == len(text) + 1 and reply.tokens[1] <= 12
        assert (reply.fault is not None and reply.fault.longer) == (reply.tokens[1] == 12)


def test_draws_are_from_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(4000, 1)
    drawn = _Dice(list(range(4000)), 0.7)(torch.zeros(4000, 1), logits).argmax(1).bincount(minlength=3) / 4000
    assert torch.allclose(drawn, (logits[0] / 0.7).softmax(0), atol=0.03)
    assert torch.equal(_Dice([0], 0.0)(torch.zeros(1, 1), logits[:1]), logits[:1])


def test_what_it_does_not_take_and_cannot_hold(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="top_p: a model that is run here takes temperature and max_tokens"):
        LocalChat.load(str(folder), {"top_p": 0.5})
    with pytest.raises(UserError, match="no causal language model"):
        LocalChat.load(str(tmp_path))
    chat = LocalChat.load(str(folder), {"temperature": 0, "max_tokens": 3})
    assert chat.ask("a", "k", seed=0, max_tokens=50).tokens[1] == 3
    with pytest.raises(UserError, match="reads 4096 tokens"):
        chat.ask("a" * 4096, "k", seed=0, max_tokens=1)


def test_nonsense_is_kept_with_its_reason_and_not_asked_again(folder: Path, tmp_path: Path) -> None:
    write_shard([Sample("p", b"\xff\xd8", "jpg", ["a brown dog jumps"])], tmp_path / "in.tar")
    call: list[Any] = ["negatives", "ask", tmp_path / "in.tar", "--out", tmp_path / "out", "--model", folder, "--local"]
    call += ["--kinds", "swap_nouns", "--set", "max_tokens=8"]
    first = run(*call)
    assert first.status == 0
    kept = (tmp_path / "out" / "answers.jsonl").read_text()
    answer = json.loads(kept)
    assert answer["texts"] == [] and answer["failed"] and answer["failed"] in first.out
    assert run(*call).status == 0 and (tmp_path / "out" / "answers.jsonl").read_text() == kept
    assert "sees none" in wrong(*call, "--pictures", "224")
    assert "either --url URL" in wrong(*call, "--url", "http://localhost:1/v1")
    assert "either --url URL" in wrong(*call[:-5], "--kinds", "swap_nouns")


def test_a_written_answer_is_believed(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a model that writes what is asked for, shards come out as from a server."""
    from clipkit.negatives.chat import Reply
    from clipkit.negatives.llm import Wish, ask

    text = '{"kind": "swap_nouns", "texts": ["a small boy jumps over a brown dog"]}'
    monkeypatch.setattr(LocalChat, "_replies", lambda self, some: [Reply(text, (5, 5)) for _ in some])
    write_shard([Sample("p", b"\xff\xd8", "jpg", ["a brown dog jumps over a small boy"])], tmp_path / "in.tar")
    report = ask(tmp_path / "in.tar", tmp_path / "out", Wish(str(folder), ["swap_nouns"]), url=None, progress=False)
    assert report.kinds == {"swap_nouns": 1} and report.tokens_out == 5
