"""What KEY.json and KEY.txt mean, and which of them cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clipkit.data.members import Unreadable, picture_bytes, read_sheet


def sheet_of(record: Any, **members: bytes) -> Any:
    return read_sheet({"json": json.dumps(record).encode(), **members})


def test_captions_come_from_json_then_txt() -> None:
    assert sheet_of({"captions": [" a ", "b"]}, txt=b"c").captions == ["a", "b"]
    assert sheet_of({"caption": "a"}, txt=b"c").captions == ["a"]
    assert sheet_of({"width": 3}, txt=b"c\n").captions == ["c"]
    assert read_sheet({"txt": "zwölf Boxkämpfer\n".encode()}).captions == ["zwölf Boxkämpfer"]


def test_negatives_keep_to_their_caption() -> None:
    negatives = [[{"text": "x", "kind": "swap"}], []]
    sheet = sheet_of({"captions": ["", "b", "c"], "negatives": negatives, "group": 7, "scene": {"n": 1}})
    assert sheet.usable() == [1, 2] and sheet.group == "7" and sheet.extra == {"scene": {"n": 1}}
    assert [sheet.negatives_of(c) for c in range(3)] == [negatives[0], [], []]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"json": b'{"captions": ["a"'}, "broken json: "),
        ({"json": b"[1]"}, "broken json: should hold names"),
        ({"json": b'{"captions": "a"}'}, "broken json: captions should be a list"),
        ({"json": b'{"captions": [1]}'}, "broken json: captions should be a list"),
        ({"json": b'{"captions": ["a"], "negatives": ["b"]}'}, "broken json: negatives should be"),
        ({"json": b'{"captions": ["a"], "negatives": [[{"kind": "swap"}]]}'}, "broken json: negatives should be"),
        ({"json": b'{"caption": "a \\uD800 b"}'}, "broken json: half a surrogate pair"),
        ({"json": b'{"caption": "a", "relevance": "high"}'}, "broken json: relevance should be 1 numbers ≥ 0"),
        ({"json": b'{"caption": "a", "relevance": -1}'}, "broken json: relevance should be numbers ≥ 0"),
        ({"json": b'{"caption": "a", "relevance": NaN}'}, "broken json: relevance should be"),
        ({"json": b'{"captions": ["a", "b"], "caption_kinds": ["x"]}'}, "broken json: caption_kinds should be 2 texts"),
        (
            {"json": b'{"caption": "a", "negatives": [[{"text": "b", "picture": "c"}]]}'},
            "broken json: negatives should",
        ),
        ({"json": b"\xff\xfe"}, "broken json: not UTF-8"),
        ({"txt": b"caf\xe9"}, "broken txt: not UTF-8"),
        ({"txt": b" \n"}, "empty caption"),
        ({"json": b"{}"}, "empty caption"),
        ({"json": b'{"captions": []}', "txt": b"a"}, "empty caption"),
    ],
)
def test_reasons(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        read_sheet(members)


def test_whole_surrogate_pairs_are_text() -> None:
    assert read_sheet({"json": b'{"caption": "a \\ud83d\\ude00"}'}).captions == ["a \U0001f600"]


def test_the_picture() -> None:
    assert picture_bytes({"txt": b"", "png": b"p"}) == ("png", b"p")
    with pytest.raises(Unreadable, match="missing picture"):
        picture_bytes({"txt": b""})
