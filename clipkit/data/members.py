"""What the members of a pair mean: KEY.jpg (or png, webp), KEY.txt and KEY.json, as bytes out of a shard.

KEY.json holds, all optional:

    captions        all of them (without it `caption`, without that KEY.txt)
    caption_kinds   one per caption: what it is, e.g. "short", "long", "de"
    relevance       a number ≥ 0, or one per caption: how well it fits (default 1)
    negatives       one list per caption of {"text", "kind", "source", "picture", "score", "weight"}; only "text" must
                    be there; "score": how hard it is, "weight" (≥ 0): what it counts;
                    "picture": j says that KEY.negativeJ.jpg (or png, webp) shows what this negative says
    group           name of the picture, where several pairs show the same one
    alternates      keys of other pairs, whose pictures are like this one
    tags            list of words for what is to be seen (`data.tags`)
    label           the picture's class, a whole number ≥ 0 or a name (`data.labels`)
    anything else   is kept
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
    caption_kinds: list[str]
    """One per caption; empty where none is named."""
    relevance: list[float]
    """One per caption."""
    negatives: list[list[dict[str, Any]]] = field(default_factory=list)
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """All other fields, and `caption_kinds`, `relevance`, `tags` and `label` as they stand there."""

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


def negative_pictures(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """The members that are pictures of negatives, by suffix ("negative0.jpg")."""
    return {suffix: data for suffix, data in members.items() if suffix.startswith("negative")}


def negative_picture(members: Mapping[str, bytes], number: int) -> bytes:
    """The picture of a negative. Raises Unreadable when there is none of this number."""
    for suffix in PICTURES:
        if (name := f"negative{number}.{suffix}") in members:
            return members[name]
    raise Unreadable(
        f"missing negative picture: a negative names picture {number}, there is no KEY.negative{number}.jpg"
    )


def read_sheet(members: Mapping[str, bytes]) -> Sheet:
    """Captions, negatives and the rest from KEY.json and KEY.txt. Raises Unreadable when no caption says anything."""
    record = _parse(members["json"]) if "json" in members else {}
    captions = record.pop("captions", None)
    single = record.pop("caption", None)
    if captions is None:
        captions = [single] if single is not None else [_text(members["txt"], "txt")] if "txt" in members else []
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise Unreadable(f"broken json: captions should be a list of texts, found {captions!r:.80}")
    sheet = Sheet(
        [c.strip() for c in captions],
        _per_caption(record.get("caption_kinds"), len(captions), "caption_kinds", "", str),
        _per_caption(record.get("relevance"), len(captions), "relevance", 1.0, float),
        record.pop("negatives", None) or [],
        record.pop("group", None),
        record,
    )
    if not sheet.usable():
        raise Unreadable("empty caption")
    if not _well_formed(sheet.negatives):
        raise Unreadable(
            'broken json: negatives should be one list per caption of {"text": ..., "picture": number}, weights ≥ 0'
        )
    if not isinstance(found := record.get("alternates", []), list) or not all(isinstance(key, str) for key in found):
        raise Unreadable(f"broken json: alternates should be a list of keys, found {found!r:.80}")
    if sheet.group is not None:
        sheet.group = str(sheet.group)
    return sheet


def tags_of(sheet: Sheet) -> list[str]:
    """The picture's tags, as `plain` words; none where the field is missing. Raises Unreadable."""
    tags = sheet.extra.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise Unreadable(f'broken json: tags should be a list of words (["dog", "lawn"]), found {tags!r:.80}')
    return [word for tag in tags if (word := plain(tag))]


def label_of(sheet: Sheet) -> int | str | None:
    """The picture's class, None where there is none. Raises Unreadable."""
    label = sheet.extra.get("label")
    if isinstance(label, str) and label.strip():
        return label.strip()
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
        raise Unreadable(f"broken json: label should be a whole number ≥ 0 or a name, found {label!r:.80}")
    return label


def plain(word: str) -> str:
    """A word as vocabularies hold it: lower case, single spaces."""
    return " ".join(word.lower().split())


def _parse(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_text(data, "json"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise Unreadable(f"broken json: {error}") from None
    if b"\\ud" in data.lower():
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Unreadable("broken json: half a surrogate pair, which no text can hold") from None
    if not isinstance(record, dict):
        raise Unreadable(f"broken json: should hold names and values, found {record!r:.80}")
    return record


def _text(data: bytes, suffix: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"broken {suffix}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _per_caption(value: Any, captions: int, name: str, default: Any, kind: type) -> list[Any]:
    """A field with one value per caption, or one for all. Raises Unreadable."""
    values = value if isinstance(value, list) else [default if value is None else value] * captions
    allowed = (int, float) if kind is float else kind
    if len(values) != captions or not all(isinstance(v, allowed) and not isinstance(v, bool) for v in values):
        wanted = "numbers ≥ 0" if kind is float else "texts"
        raise Unreadable(f"broken json: {name} should be {captions} {wanted}, one per caption, found {value!r:.80}")
    if kind is float and not all(0 <= v < float("inf") for v in values):
        raise Unreadable(f"broken json: {name} should be numbers ≥ 0, found {value!r:.80}")
    return [kind(v) for v in values]


def _well_formed(negatives: Any) -> bool:
    return isinstance(negatives, list) and all(
        isinstance(group, list) and all(_is_negative(n) for n in group) for group in negatives
    )


def _is_negative(negative: Any) -> bool:
    if not isinstance(negative, dict) or not isinstance(negative.get("text"), str):
        return False
    picture = negative.get("picture", 0)
    numbers = [negative[name] for name in ("weight", "score") if name in negative]
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < float("inf") for n in numbers):
        return False
    return isinstance(picture, int) and not isinstance(picture, bool) and min(picture, negative.get("weight", 0)) >= 0
