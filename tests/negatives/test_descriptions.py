"""Descriptions and tags by HQ-CLIP's recipe: where they go, and the pictures that the model is shown."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.data.build import Sample, write_shard
from clipkit.negatives.llm import Wish, estimate
from tests.chat import ChatHandler, ChatServer
from tests.negatives.conftest import DESCRIPTIONS, asked, sheets

CAPTIONS = [["a brown dog jumps over two small boys", "one dog in mid air"], ["a red bus near an old church"]]


def test_descriptions_and_tags_go_where_they_belong(tmp_path: Path, server: ChatServer) -> None:
    shards = tmp_path / "s.tar"
    write_shard([Sample(f"p{i}", b"\xff\xd8", "jpg", some) for i, some in enumerate(CAPTIONS)], shards)
    written = {
        "long_description": "a dog with brown fur is in the air over two boys who are small",
        "short_description": "a jumping dog",
        "long_negative": "a cat with grey fur lies asleep between two tall girls on a wide green lawn",
        "short_negative": "a sleeping cat",
        "tags": "Dog, two boys, jumping",
        "false_tags": "cat, dog, girls, snow",
    }

    def write(handler: ChatHandler, question: tuple[str, str], number: int) -> bool:
        handler.complete({"kind": question[1], "texts": [written[question[1]]]})
        return True

    server.fault = write
    report = asked(shards, tmp_path / "out", server, Wish("m", DESCRIPTIONS))
    first, second = sheets(tmp_path / "out" / "s.tar")
    dog = first["captions"].index(CAPTIONS[0][0])
    assert first["captions"][2:] == [written["long_description"], written["short_description"]]
    assert first["caption_kinds"] == ["original", "original", "long", "short"]
    assert [n["kind"] for n in first["negatives"][dog]] == ["long_negative", "short_negative"]
    assert first["tags"] == ["dog", "two boys", "jumping"]
    assert first["false_tags"] == ["cat", "girls", "snow"]  # the caption says dog
    assert second["false_tags"] == ["cat", "dog", "girls", "snow"] and report.kinds["tags"] == 3
    text = server.requests[0]["messages"][0]["content"]
    assert text.startswith("You write about pictures") and "exactly 1 in texts" in text


def picture(size: tuple[int, int], kind: str, colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def shown(request: dict[str, Any]) -> tuple[str, bytes]:
    """(mime type, bytes) of the picture in a request, and the caption stands before it."""
    text, image = request["messages"][0]["content"]
    assert text["type"] == "text" and text["text"].endswith('"a dog"') and image["type"] == "image_url"
    head, _, data = image["image_url"]["url"].partition(";base64,")
    return head, base64.b64decode(data)


def test_pictures_are_shown_beside_their_captions(tmp_path: Path, server: ChatServer) -> None:
    """Large ones smaller, others as they are; a caption of two pictures is asked about with each."""
    small, large = picture((40, 30), "PNG", "red"), picture((400, 200), "JPEG", "blue")
    samples = [Sample("a", small, "png", ["a dog"]), Sample("b", large, "jpg", ["a dog"])]
    samples += [Sample("c", small, "png", ["a dog"]), Sample("d", b"\xff\xd8", "jpg", ["a cat"])]
    write_shard(samples, tmp_path / "s.tar")
    server.fault = lambda handler, *_: handler.complete(
        {"kind": "short_negative", "texts": [f"a cat {len(shown(handler.asked)[1])}"]}
    ) or True  # fmt: skip
    wish = Wish("m", ["short_negative"], pictures=56)
    report = asked(tmp_path / "s.tar", tmp_path / "out", server, wish)
    assert report.asked == 3 and report.failed == {"unreadable picture": 1}
    (kind, data), (other, sent) = sorted(map(shown, server.requests), reverse=True)
    assert kind == "data:image/png" and data == small
    assert other == "data:image/jpeg" and Image.open(io.BytesIO(sent)).size == (56, 28)
    texts = [[n["text"] for n in sheet["negatives"][0]] for sheet in sheets(tmp_path / "out" / "s.tar")]
    assert texts == [[f"a cat {len(small)}"], [f"a cat {len(sent)}"], [f"a cat {len(small)}"], []]
    assert "shown to you" in server.requests[0]["messages"][0]["content"][0]["text"]

    again = asked(tmp_path / "s.tar", tmp_path / "out", server, wish)
    assert (again.asked, again.known, again.kept_shards) == (0, 3, 1)
    smaller = Wish("m", ["short_negative"], pictures=28)
    without = Wish("m", ["short_negative"])
    costs = [estimate(tmp_path / "s.tar", tmp_path / "out", w)[0] for w in (wish, smaller, without)]
    assert [cost.requests for cost in costs] == [0, 3, 2]
    assert costs[1].tokens_in / 3 > costs[2].tokens_in / 2
