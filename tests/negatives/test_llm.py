"""Negatives by a language model: what is asked, what is believed, what is kept; a real server with real faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit.data.build import Sample, write_shard
from clipkit.errors import UserError
from clipkit.negatives import asking, chat, llm
from clipkit.negatives.answers import Answer, Answers, Order, Question
from clipkit.negatives.chat import Fault, endpoint, read_texts
from clipkit.negatives.filters import Case, reason_to_drop
from clipkit.negatives.llm import Wish, ask, estimate
from clipkit.negatives.make import KINDS, make
from clipkit.negatives.prompts import load_prompts
from tests.chat import ChatHandler, ChatServer
from tests.negatives.conftest import DESCRIPTIONS, asked, sheets
from tests.server import Handler
from tests.typed import well, wrong

CAPTIONS = [["a brown dog jumps over two small boys", "one dog in mid air"], ["a red bus near an old church"]]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def shard(path: Path, captions: list[list[str]], extra: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    write_shard([Sample(f"p{i:05}", b"\xff\xd8", "jpg", some, extra or {}) for i, some in enumerate(captions)], path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return shard(tmp_path / "in" / "s.tar", CAPTIONS)


# prompts and answers


@pytest.mark.parametrize("kind", [*KINDS, llm.PARAPHRASE, *DESCRIPTIONS])
def test_examples_pass_the_filters_of_their_kind(kind: str) -> None:
    prompt = load_prompts([kind])[kind]
    assert len(prompt.examples) >= 5
    for caption, texts in prompt.examples:
        assert len(set(texts)) == 2
        assert [reason_to_drop(Case(text, caption, kind)) for text in texts] == ["", ""], caption


def test_a_prompt_names_its_version_and_shows_its_caption_last(tmp_path: Path) -> None:
    prompt = load_prompts(["swap_nouns"])["swap_nouns"]
    text = prompt.text('a "big" $dog', 2, seed=0)
    assert text.endswith('Caption: "a \\"big\\" $dog"') and "exactly 2 in texts" in text and text.count("Caption:") == 6
    assert prompt.text("b", 2, 0).rpartition("Caption")[0] == text.rpartition("Caption")[0]
    assert prompt.text("b", 2, 1).rpartition("Caption")[0] != text.rpartition("Caption")[0]

    own = {"version": 7, "goal": "negative", "rule": "Say no.", "examples": [{"caption": "a", "texts": ["no a"]}]}
    (tmp_path / "negation.yaml").write_text(yaml.safe_dump(own))
    made = load_prompts(["negation", "swap_nouns"], tmp_path)
    assert made["negation"].mark.startswith("7.1-") and made["swap_nouns"] == prompt
    (tmp_path / "negation.yaml").write_text(yaml.safe_dump(own | {"rule": "Say never."}))
    assert load_prompts(["negation"], tmp_path)["negation"].mark != made["negation"].mark
    (tmp_path / "negation.yaml").write_text("rule: x")
    with pytest.raises(UserError, match="negation.yaml: no prompt"):
        load_prompts(["negation"], tmp_path)
    with pytest.raises(UserError, match="did you mean swap_nouns"):
        load_prompts(["swap_noun"])


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"kind": "k", "texts": ["a", "b"', "broken JSON"),
        ("", "broken JSON"),
        ("[1]", "other JSON"),
        ('{"kind": "k", "text": "a"}', "other JSON"),
        ('{"kind": "k", "texts": ["a", 1]}', "other JSON"),
        ('{"kind": "other", "texts": ["a", "b"]}', "another kind"),
        ('{"kind": "k", "texts": ["a", " "]}', "empty text"),
        ('{"kind": "k", "texts": ["a", "a"]}', "too few texts"),
        ("I'm sorry, but I can't help with that.", "refused"),
    ],
)
def test_answers_that_are_not_believed(content: str, reason: str) -> None:
    with pytest.raises(Fault, match=reason) as fault:
        read_texts(content, "k", 2)
    assert fault.value.again == (reason != "refused")


def test_answers_in_wrappings() -> None:
    plain = '{"kind": "k", "texts": ["a  dog", "b", "c"]}'
    for content in (plain, f"```json\n{plain}\n```", f"<think>{{no}}</think>\nHere: {plain} Enjoy!"):
        assert read_texts(content, "k", 2) == ("a dog", "b")


def test_addresses() -> None:
    whole = "http://h:1/v1/chat/completions"
    assert {endpoint(url) for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", whole)} == {whole}
    assert endpoint("https://h/api/v2") == "https://h/api/v2/chat/completions"


# the file of answers


def test_answers_are_found_by_all_that_was_asked(tmp_path: Path) -> None:
    order, question = Order("m", 1, 0, {"k": "1"}), Question("a dog \ud83d", "k")
    others = [Order("n", 1, 0, {"k": "1"}), Order("m", 2, 0, {"k": "1"}), Order("m", 1, 1, {"k": "1"})]
    others += [Order("m", 1, 0, {"k": "2"}), Order("m", 1, 0, {"k": "1"}, {"temperature": 0})]
    answer = Answer(("a cat",), "", (5, 3))
    with Answers(tmp_path / "a.jsonl") as answers:
        answers.add([(order.fields(question), answer)])
        assert answers.get(order.fields(question)) == answer
        assert not any(other.fields(question) in answers for other in others)
        with pytest.raises(UserError, match="another call"), Answers(tmp_path / "a.jsonl"):
            pass
    with Answers(tmp_path / "a.jsonl", write=False) as answers:
        assert answers.get(order.fields(question)) == answer
        assert answers.tokens["k", "1", "m"] == {"answers": 1, "in": 5, "out": 3}


def test_torn_and_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    order, path = Order("m", 1, 0, {"k": "1"}), tmp_path / "a.jsonl"
    with Answers(path) as answers:
        for name in "abc":
            answers.add([(order.fields(Question(name, "k")), Answer((name * 2,)))])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 20 + b"\n" + lines[1] + lines[2][:-5])
    with Answers(path) as answers:
        known = [answers.get(order.fields(Question(name, "k"))) for name in "abc"]
        assert known == [Answer(("aa",)), Answer(("bb",)), None]
        answers.add([(order.fields(Question("c", "k")), Answer(failed="refused"))])
    with Answers(path) as answers:
        assert answers.get(order.fields(Question("c", "k"))) == Answer(failed="refused")
        assert answers.get(order.fields(Question("a", "k"))) == Answer(("aa",))


# asking


def test_negatives_stand_beside_those_of_rules(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    make(shards, tmp_path / "rules", workers=1, progress=False)
    report = asked(tmp_path / "rules", tmp_path / "out", server, Wish("m", per_kind=2, seed=3))
    mark = load_prompts(["swap_nouns"])["swap_nouns"].mark
    for old, new in zip(sheets(tmp_path / "rules" / "s.tar"), sheets(tmp_path / "out" / "s.tar")):
        assert new["captions"] == old["captions"] and "caption_kinds" not in new
        for before, after in zip(old["negatives"], new["negatives"]):
            assert after[: len(before)] == before
            made = after[len(before) :]
            assert {n["source"] for n in made} == {"llm"} and {n["seed"] for n in made} == {3}
            assert {n["model"] for n in made} == {"m"} and len({n["text"] for n in after}) == len(after)
            assert {n["prompt"] for n in made if n["kind"] == "swap_nouns"} <= {mark}
    assert report.asked == len(server.asked) == 3 * 5 and report.captions == 3 and not report.unanswered
    assert report.kinds.total() + sum(report.drops["swap_nouns"].values()) <= 30 and report.covered["any"] == 3
    assert report.tokens_in == 1500 and set(server.answered.values()) == {1}
    assert {request["seed"] for request in server.requests} == {3}
    assert {request["response_format"]["type"] for request in server.requests} == {"json_schema"}

    again = asked(tmp_path / "rules", tmp_path / "out", server, Wish("m", per_kind=2, seed=3))
    assert (again.asked, again.known, again.kept_shards) == (0, 15, 1) and again.kinds == report.kinds
    assert server.answered.total() == 15


def test_paraphrases_become_captions(tmp_path: Path, server: ChatServer) -> None:
    shards = shard(tmp_path / "in" / "s.tar", CAPTIONS, {"relevance": 0.5})
    wish = Wish("m", [llm.PARAPHRASE, llm.AGAIN, "reshuffle"])
    report = asked(shards, tmp_path / "out", server, wish)
    (first, second) = sheets(tmp_path / "out" / "s.tar")
    assert second["captions"] == [CAPTIONS[1][0], f"{CAPTIONS[1][0]}x", f"{CAPTIONS[1][0]}xx"]
    assert second["caption_kinds"] == ["original", "once", "twice"]
    assert first["caption_kinds"] == ["original"] * 2 + ["once", "twice"] * 2 and len(first["captions"]) == 6
    assert [len(some) for some in first["negatives"]] == [1, 1]
    assert report.kinds == {"paraphrase": 3, "paraphrase_again": 3, "reshuffle": 3} and report.asked == 9
    with pytest.raises(UserError, match="name both"):
        Wish("m", [llm.AGAIN])


def test_every_fault_is_mended_or_recorded(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    silence = threading.Event()
    kinds = ["reshuffle", "replace_adjectives", "swap_nouns", "replace_nouns"]
    faults: dict[tuple[str, str], Any] = {
        (caption, kind): None for caption in (*CAPTIONS[0], *CAPTIONS[1]) for kind in kinds
    }
    troubles = [
        lambda h: silence.wait(20),  # longer than the client waits
        lambda h: h.say(429, {"error": {"message": "slow"}}, Retry_After="0.05"),
        lambda h: h.say(500, {"error": "broken"}),
        lambda h: h.complete('{"kind": "repl'),
        lambda h: h.complete('{"kind": "repl', finish="length"),
        lambda h: h.complete({"kind": h.question[1], "texts": [h.question[0]]}),
        lambda h: Handler.reset(h),
        lambda h: h.say(200, "no JSON"),
    ]  # fmt: skip
    faults.update(zip(faults, troubles))
    refused, hopeless = (CAPTIONS[1][0], "swap_nouns"), (CAPTIONS[1][0], "replace_nouns")

    def fault(handler: ChatHandler, question: tuple[str, str], number: int) -> bool:
        if question == refused:
            handler.complete("", refusal="I would rather not.")
        elif question == hopeless:
            handler.complete("not at all")
        elif number == 1 and faults[question]:
            faults[question](handler)
        else:
            return False
        return True

    server.fault = fault
    report = asked(shards, tmp_path / "out", server, Wish("m", kinds), timeout_s=2, concurrency=4)
    silence.set()
    assert report.failed == {"refused": 1, "broken JSON": 1} and not report.unanswered
    assert server.asked[refused] == 1 and server.asked[hopeless] == asking.ANSWERS
    assert set(server.answered) == set(faults) - {refused, hopeless}
    assert set(server.answered.values()) == {1}
    assert report.again["identical"] == report.again["truncated"] == 1 and report.again["broken JSON"] == 3
    assert report.again["the server answered 429 Too Many Requests"] == 1
    assert report.again.total() == len(troubles) + 2
    (longer,) = [r for r in server.requests if r["max_tokens"] == 400]
    assert longer["seed"] == 1
    assert report.empty["swap_nouns"]["refused"] == 1

    server.fault = None  # what is hopeless is known to be so, and not asked again
    before = server.asked.copy()
    assert asked(shards, tmp_path / "out", server, Wish("m", kinds)).failed == {}
    assert server.asked == before


def test_nobody_asks_while_the_server_wants_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], []

    def pause(self: asking.Pace, seconds: float) -> None:
        slept.append(round(max(0.0, seconds), 6))
        now[0] += max(0.0, seconds)

    monkeypatch.setattr(asking.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(asking.Pace, "pause", pause)
    pace = asking.Pace(per_minute=120)
    for _ in range(3):
        pace.take()
    assert slept == [0.0, 0.5, 0.5]
    pace.hold(7)
    pace.hold(3)
    pace.take()
    assert slept[3:] == [0.5, 6.5]
    pace.hold(1e9)
    assert pace._held == now[0] + asking.LONGEST_RETRY_AFTER_S


def test_a_server_of_no_use_is_given_up(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    os.environ[llm.KEY] = "sk-secret"
    try:
        server.fault = lambda handler, *_: handler.say(401, {"error": {"message": "bad key sk-secret"}}) or True
        with pytest.raises(UserError, match="not allowed .*bad key \\*\\*\\*.*CLIPKIT_LLM_KEY") as caught:
            asked(shards, tmp_path / "out", server)
        assert "secret" not in str(caught.value) and set(server.keys) == {"Bearer sk-secret"}
        os.environ[llm.KEY] = "sk-\nsecret"
        with pytest.raises(UserError, match="characters that no key has") as caught:
            asked(shards, tmp_path / "out", server)
        assert "secret" not in str(caught.value) and "secret" not in repr(chat.Chat("u", "m", "secret"))
    finally:
        del os.environ[llm.KEY]
    server.fault = lambda handler, *_: handler.say(400, {"error": {"message": "no response_format"}}) or True
    with pytest.raises(UserError, match="8 questions in a row .* 400 Bad Request: no response_format"):
        asked(shards, tmp_path / "out", server, concurrency=2)
    assert server.asked.total() < 60  # not tried again and again
    with pytest.raises(UserError, match="404 Not Found: nothing here; give the address"):
        ask(shards, tmp_path / "out", Wish("m"), url=f"{server.url}/v2", progress=False)
    server.fault = lambda handler, *_: handler.say(400, {"error": {"code": "content_filter"}}) or True
    assert asked(shards, tmp_path / "out", server).failed == {"refused": 15}


def test_what_was_not_answered_is_asked_by_the_next_call(
    shards: Path, tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "TRIES", 2)
    server.fault = lambda handler, question, _: question[0] == CAPTIONS[1][0] and (handler.say(503, {}) or True)
    report = asked(shards, tmp_path / "out", server, Wish("m", ["reshuffle"]))
    assert report.unanswered == {"no answer": 1} and report.empty["reshuffle"] == {"not answered": 1}
    server.fault = None
    report = asked(shards, tmp_path / "out", server, Wish("m", ["reshuffle"]))
    assert (report.asked, report.known, report.kept_shards) == (1, 2, 0) and report.covered["any"] == 3


def test_a_pause_of_the_user_keeps_what_was_under_way(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    wish = Wish("m", ["reshuffle"])
    with Answers(tmp_path / "a.jsonl") as answers:
        asker = asking.Asker(
            chat.Chat(server.url, "m"), wish.order, wish.prompts, answers, concurrency=1, per_minute=0
        )  # fmt: skip
        gate = threading.Event()
        server.fault = lambda handler, question, _: question[0] != CAPTIONS[0][0] and not gate.wait(10)
        running = asker.ask_all(list(wish.questions(shards)))
        next(running)
        while server.asked.total() < 2:
            time.sleep(0.001)
        threading.Timer(0.05, gate.set).start()
        running.close()
        assert asker.answered == 2 == server.answered.total() == sum(server.asked.values())


# a run that is killed

RUN = """
import sys
from clipkit.negatives.llm import Wish, ask
shards, out, url = sys.argv[1:]
ask(shards, out, Wish("m", {kinds}), url=url, timeout_s=20, concurrency={n}, progress=False)
"""
KILL_KINDS = ["reshuffle", "replace_nouns"]
SIDE_BY_SIDE = 8


def killed_twice(tmp_path: Path, server: ChatServer, number: int) -> tuple[Counter[Any], int]:
    """What three runs asked although its answer was on the disk, and how many questions they asked twice."""
    captions = [[f"{WORDS[i % 10]} dogs {i} and {WORDS[i // 10 % 10]} cats"] for i in range(number)]
    shards, out = shard(tmp_path / "in" / "s.tar", captions), tmp_path / "out"
    faults = {7: lambda h: h.say(429, {}, Retry_After="0.01"), 23: lambda h: h.say(500, {}), 31: Handler.reset,
              57: lambda h: h.complete('{"kind"'), 77: lambda h: h.complete("{", finish="length")}  # fmt: skip
    command = RUN.format(kinds=KILL_KINDS, n=SIDE_BY_SIDE)
    total, troubled, refused = number * len(KILL_KINDS), Counter(), Counter()
    stop, process = threading.Event(), None

    def fault(handler: ChatHandler, question: tuple[str, str], number: int) -> bool:
        if server.answered.total() >= goal and not stop.is_set():
            stop.set()
            process.send_signal(signal.SIGKILL)
        place = captions_at[question[0]]
        if place % 101 == 100:
            refused[question] += 1
            handler.complete("I'm sorry, I can't.")
            return True
        if number == 1 and place % 100 in faults:
            troubled[question] += 1
            faults[place % 100](handler)
            return True
        return False

    captions_at = {some[0]: i for i, some in enumerate(captions)}
    server.fault, wrongly = fault, Counter()
    for goal in (total // 3, 2 * total // 3, float("inf")):
        stop.clear()
        before = server.asked.copy()
        file = out / llm.FILE
        lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        known = {(entry["caption"], entry["kind"]) for entry in map(json.loads, lines)}
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen([sys.executable, "-c", command, shards, out, server.url], env=environment)
        assert process.wait(3000) == (0 if goal == float("inf") else -signal.SIGKILL)
        wrongly.update((server.asked - before).keys() & known)
    assert set(server.answered) | set(refused) == {(caption, kind) for (caption,) in captions for kind in KILL_KINDS}
    (written,) = [sheets(out / "s.tar")]
    for i, sheet in enumerate(written):
        expected = set() if i % 101 == 100 else set(KILL_KINDS)
        assert {negative["kind"] for negative in sheet["negatives"][0]} == expected
    assert len(written) == number
    kept = (out / llm.FILE).read_text().splitlines()
    assert len(kept) == len({(entry["caption"], entry["kind"]) for entry in map(json.loads, kept)}) == total
    twice = sum(times - 1 - troubled[question] for question, times in server.asked.items())
    return wrongly, twice


@pytest.mark.parametrize("number", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_killed_twice_nothing_kept_is_asked_again_and_nothing_lost(
    tmp_path: Path, server: ChatServer, number: int
) -> None:
    wrongly, twice = killed_twice(tmp_path, server, number)
    print(f"{number} captions, {len(KILL_KINDS)} kinds: {server.asked.total()} requests, {twice} under way at a kill")
    assert not wrongly
    assert twice <= 2 * 2 * SIDE_BY_SIDE  # what was under way, or came and was not yet on the disk, at two kills


# cost, and the command


def test_the_estimate_counts_what_is_left(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    kinds = ["reshuffle", llm.PARAPHRASE, llm.AGAIN]
    costs = {cost.kind: cost for cost in estimate(shards, tmp_path / "out", Wish("m", kinds))}
    assert not server.asked and not (tmp_path / "out").exists()
    assert {kind: cost.requests for kind, cost in costs.items()} == dict.fromkeys(kinds, 3)
    asked(shards, tmp_path / "out", server, Wish("m", ["reshuffle"]))
    sent = sum(len(request["messages"][0]["content"]) for request in server.requests)
    assert costs["reshuffle"].tokens_in == round(sent / 4) and 0 < costs["reshuffle"].tokens_out < 100
    left = estimate(shards, tmp_path / "out", Wish("m", kinds))
    assert [cost.requests for cost in left] == [0, 3, 3]

    many = shard(tmp_path / "many" / "m.tar", [[f"a dog {i} runs"] for i in range(40)])
    asked(many, tmp_path / "more", server, Wish("m", ["reshuffle"], limit=25))
    (cost,) = estimate(many, tmp_path / "more", Wish("m", ["reshuffle"]))
    assert (cost.requests, cost.tokens_in, cost.tokens_out, cost.measured) == (15, 1500, 150, True)


def test_the_command(shards: Path, tmp_path: Path, server: ChatServer) -> None:
    call = ["negatives", "ask", shards, "--out", tmp_path / "out", "--url", server.url, "--model", "m"]
    call += ["--kinds", "reshuffle", "--prices", "2000", "1000"]
    rows = [line.split("\t") for line in well(*call, "--estimate").splitlines()]
    assert rows[-1][:2] == ["any", "3"] and float(rows[-1][4]) > 0 and not server.asked
    printed = well(*call, "--set", "temperature=0", "--set", "seed=null", "--limit", "2")
    assert "questions asked\t2" in printed and "cost\t0.42" in printed
    assert all(request["temperature"] == 0 and "seed" not in request for request in server.requests)
    assert sum(len(some) for sheet in sheets(tmp_path / "out" / "s.tar") for some in sheet["negatives"]) == 2
    assert "is not to be set" in wrong(*call, "--set", "model=x")
    assert "did you mean reshuffle?" in wrong(*call[:-5], "--kinds", "reshufle")
