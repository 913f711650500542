"""What the members of a pair mean: KEY.jpg (or png, webp), KEY.txt and KEY.json, as bytes out of a shard.

KEY.json: `captions` (all of them; without it `caption`, without that KEY.txt), `negatives` (one list per caption of
{"text", "kind", ...}), `group` (name of the picture, where several pairs show the same one), and free others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PICTURES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of a picture, the preferred one first."""
SHEETS = ("json", "txt")
"""Suffixes that hold captions."""


class Unreadable(ValueError):
    """A sample that cannot be used. The reason is counted by what stands before its colon."""


@dataclass
class Sheet:
    """All that is written about a picture. `negatives[c]` belongs to `captions[c]`; empty captions keep their place."""

    captions: list[str]
    negatives: list[list[dict[str, Any]]] = field(default_factory=list)
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def usable(self) -> list[int]:
        """Positions of the captions that say something."""
        return [c for c, caption in enumerate(self.captions) if caption]

    def negatives_of(self, caption: int) -> list[dict[str, Any]]:
        """The hard negatives of one caption."""
        return self.negatives[caption] if caption < len(self.negatives) else []


def picture_bytes(members: Mapping[str, bytes]) -> tuple[str, bytes]:
    """(suffix, bytes) of the picture. Raises Unreadable when there is none."""
    for suffix in PICTURES:
        if suffix in members:
            return suffix, members[suffix]
    raise Unreadable("missing picture")


def read_sheet(members: Mapping[str, bytes]) -> Sheet:
    """Captions, negatives and the rest from KEY.json and KEY.txt. Raises Unreadable when no caption says anything."""
    record = _parse(members["json"]) if "json" in members else {}
    captions = record.pop("captions", None)
    single = record.pop("caption", None)
    if captions is None:
        captions = [single] if single is not None else [_text(members["txt"], "txt")] if "txt" in members else []
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise Unreadable(f"broken json: captions should be a list of texts, found {captions!r:.80}")
    sheet = Sheet([c.strip() for c in captions], record.pop("negatives", None) or [], record.pop("group", None), record)
    if not sheet.usable():
        raise Unreadable("empty caption")
    if not _well_formed(sheet.negatives):
        raise Unreadable('broken json: negatives should be one list per caption of {"text": ...}')
    if sheet.group is not None:
        sheet.group = str(sheet.group)
    return sheet


def _parse(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_text(data, "json"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise Unreadable(f"broken json: {error}") from None
    if not isinstance(record, dict):
        raise Unreadable(f"broken json: should hold names and values, found {record!r:.80}")
    return record


def _text(data: bytes, suffix: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"broken {suffix}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _well_formed(negatives: Any) -> bool:
    return isinstance(negatives, list) and all(
        isinstance(group, list) and all(isinstance(n, dict) and isinstance(n.get("text"), str) for n in group)
        for group in negatives
    )
