"""Where asking a language model meets what lies there, and what is said when no answer comes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from clipkit.data.build import Sample, write_shard
from clipkit.data.shards import Index
from clipkit.errors import UserError
from clipkit.negatives import asking
from clipkit.negatives.llm import Wish, estimate
from clipkit.negatives.make import make
from tests.chat import ChatServer
from tests.negatives.conftest import asked, sheets
from tests.typed import well, wrong

CAPTIONS = [["a brown dog jumps over two small boys", "one dog in mid air"], ["a red bus near an old church"]]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    write_shard([Sample(f"p{i}", b"\xff\xd8", "jpg", some) for i, some in enumerate(CAPTIONS)], tmp_path / "in/s.tar")
    return tmp_path / "in" / "s.tar"


def test_embeddings_of_fewer_captions_go(tmp_path: Path, server: ChatServer) -> None:
    rows = {"m.text.npy": b"texts", "m.negatives.npy": b"negatives"}
    pairs = [Sample(f"p{i}", b"\xff\xd8", "jpg", some, negative_images=rows) for i, some in enumerate(CAPTIONS)]
    write_shard(pairs, tmp_path / "s.tar")
    asked(tmp_path / "s.tar", tmp_path / "once", server, Wish("m", ["paraphrase"], limit=2))
    index = Index.load(tmp_path / "once")
    assert [sorted(index.read(id).keys() & rows.keys()) for id in range(2)] == [["m.negatives.npy"], sorted(rows)]
    asked(tmp_path / "s.tar", tmp_path / "other", server, Wish("m", ["reshuffle"]))
    index = Index.load(tmp_path / "other")
    assert [index.read(id).keys() & rows.keys() for id in range(2)] == [{"m.text.npy"}] * 2


def test_the_estimate_counts_open_questions_about_paraphrases(
    shards: Path, tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = Wish("m", ["paraphrase", "paraphrase_again"])
    monkeypatch.setattr(asking, "TRIES", 1)
    server.fault = lambda handler, question, _: question[0].endswith("x") and (handler.say(503, {}) or True)
    assert asked(shards, tmp_path / "out", server, wish).unanswered.total() == 3
    costs = estimate(shards, tmp_path / "out", wish)
    assert [cost.requests for cost in costs] == [0, 3] and costs[1].tokens_in > 300
    server.fault = lambda handler, question, _: question[0] == f"{CAPTIONS[1][0]}x" and (handler.say(503, {}) or True)
    asked(shards, tmp_path / "out", server, wish)
    assert [cost.requests for cost in estimate(shards, tmp_path / "out", wish)] == [0, 1]


def test_the_servers_reason_is_shown(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    call = ["negatives", "ask", shards, "--out", tmp_path / "out", "--url", server.url, "--model", "m"]
    call += ["--kinds", "reshuffle"]
    server.fault = lambda handler, *_: handler.say(400, {"error": {"message": "unknown field: x"}}) or True
    message = wrong(*call)
    assert "not one of 3 questions was answered, at last: 400 Bad Request: unknown field: x" in message
    assert not (tmp_path / "out" / "s.tar").exists()
    # What one caption meets ends no call that brings others; nor does it keep these from the shards.
    refuse = server.fault
    server.fault = lambda handler, question, n: question[0] == CAPTIONS[1][0] and refuse(handler, question, n)
    assert "rejected\t1\t400 Bad Request: unknown field: x" in well(*call)
    (tmp_path / "out" / "s.tar").unlink()
    assert "not one of 1 questions" in wrong(*call) and len(sheets(tmp_path / "out/s.tar")[0]["negatives"][0]) == 1


def test_mistakes_are_found_before_the_asking(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    call = ["negatives", "ask", shards, "--out", tmp_path / "out", "--model", "m", "--kinds", "reshuffle", "--url"]
    assert "--url localhost:8000: begins with http:// or https://" in wrong(*call, "localhost:8000")
    frame = (resources.files("clipkit.negatives") / "data/prompts/frame.yaml").read_text()
    for text, message in (("$ruel", "names $ruel; it may name kind, rule"), ("50 $", "Invalid placeholder")):
        (tmp_path / "frame.yaml").write_text(frame.replace("$rule", text))
        assert message in wrong(*call, server.url, "--prompts", tmp_path)
    (tmp_path / "out").write_text("a file")
    assert "out: is a file, and shards go to a folder" in wrong(*call, server.url)
    assert not server.asked


def test_reasons_are_whole(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    server.fault = lambda handler, _, number: number == 1 and (handler.say(200, "no: JSON") or True)
    report = asked(shards, tmp_path / "out", server, Wish("m", ["reshuffle"]))
    assert report.again == {"no completion came": 3}
    assert report.said["no completion came"].startswith("no completion came: JSONDecodeError: Expecting value")


def test_rules_and_models_do_not_replace_each_others_shards(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    wish = Wish("m", ["reshuffle"])
    make(shards, tmp_path / "rules", workers=1, progress=False)
    with pytest.raises(UserError, match=r"s\.tar: is there already"):
        asked(shards, tmp_path / "rules", server, wish)
    assert not server.asked and {n["source"] for n in sheets(tmp_path / "rules/s.tar")[0]["negatives"][0]} == {"rule"}
    asked(shards, tmp_path / "model", server, wish)
    assert asked(shards, tmp_path / "model", server, Wish("m", ["swap_nouns"])).kept_shards == 0
    with pytest.raises(UserError, match=r"s\.tar: is there already"):
        make(shards, tmp_path / "model", workers=1, progress=False)
    asked(shards, tmp_path / "rules", server, wish, overwrite=True)
    assert {n["source"] for n in sheets(tmp_path / "rules/s.tar")[0]["negatives"][0]} == {"llm"}
