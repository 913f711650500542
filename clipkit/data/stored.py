"""Embeddings that lie in the shards, as members of a pair: one set a model, called as one likes.

    KEY.SET.text.npy        [captions f]   one row a caption, in their order
    KEY.SET.negatives.npy   [negatives f]  one row a negative, those of the first caption first
    KEY.SET.image.npy       [f]            of the picture

float16 or float32 in numpy's own format, of which nothing is ever unpickled. Axes: w places a pair, f features.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clipkit.data.members import SHEETS, Sheet, Unreadable

if TYPE_CHECKING:
    from clipkit.settings import DataConfig

PARTS = {"image": "image", "text": "text", "positive_text": "text", "negative_text": "negatives"}
"""Which member holds a role's rows: SET.PART.npy."""
MEMBER = re.compile(r"[\w-]+\.(?:image|text|negatives)\.npy")


@dataclass(frozen=True)
class Request:
    """What one table of the batch is read from."""

    field: str
    """Its name in `Batch`."""
    role: str
    member: str
    """The suffix of the member: SET.PART.npy."""


@dataclass(frozen=True)
class Wanted:
    """Which members of a pair are read, by suffix: of stored arrays only those asked for."""

    pictures: bool
    stored: frozenset[str]

    def __contains__(self, suffix: object) -> bool:
        if MEMBER.fullmatch(str(suffix)):
            return suffix in self.stored
        return self.pictures or suffix in SHEETS


def requests(data: DataConfig, teacher_roles: Sequence[str]) -> list[Request]:
    """What `data.text_features` and `data.teacher_features` ask for, of the roles that the batch has."""
    places = {"positive_text": data.positives, "negative_text": data.negatives}
    roles = [role for role in PARTS if places.get(role, 1)]
    out = []
    if data.text_features:
        out += [
            Request(f"{role}_features", role, f"{data.text_features}.{PARTS[role]}.npy")
            for role in roles
            if role != "image"
        ]
    if data.teacher_features:
        out += [
            Request(f"teacher_{role}", role, f"{data.teacher_features}.{PARTS[role]}.npy")
            for role in roles
            if role in teacher_roles
        ]
    return out


def read_rows(data: bytes, part: str, sheet: Sheet) -> np.ndarray:
    """The array of a member SET.PART.npy: [rows f], of a picture [f]. Raises Unreadable.

    Its shape is compared with the pair's captions and negatives, and with the bytes that are there, before it is made.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(file)
    except ValueError as error:
        raise Unreadable(f"broken features: not a plain .npy: {error}") from None
    rows = {"text": len(sheet.captions), "negatives": sum(map(len, sheet.negatives)), "image": None}[part]
    if dtype not in (np.float16, np.float32) or by_column:
        raise Unreadable(f"broken features: should be float16 or float32 by rows, found {dtype}")
    if len(shape) != (1 if rows is None else 2) or rows not in (None, shape[0]):
        wanted = "[f]" if rows is None else f"[{rows} f], one row each"
        raise Unreadable(f"broken features: {part} should be {wanted}, found {list(shape)}")
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize != len(data) - file.tell():
        raise Unreadable(f"broken features: {len(data)} bytes do not hold {list(shape)} of {dtype}")
    array = np.frombuffer(data, dtype, count, file.tell()).reshape(shape).astype(np.float32)
    if not np.isfinite(array).all():
        raise Unreadable("broken features: not all of them are finite")
    return array


def stored_rows(
    members: dict[str, bytes], sheet: Sheet, asked: Sequence[Request], places: dict[str, list[int]]
) -> dict[str, np.ndarray]:
    """Float32 tables by name in `Batch`: [f] of the picture and the caption, [≤w f] of further texts.

    `places`: which rows the texts of each role are. Raises Unreadable.
    """
    out = {}
    for request in asked:
        if request.member not in members:
            raise Unreadable(f"missing features: there is no KEY.{request.member}; `clipkit shards embed` writes it")
        array = read_rows(members[request.member], PARTS[request.role], sheet)
        if request.role == "text":
            array = array[places["text"][0]]
        elif request.role != "image":
            array = array[places[request.role]]
        out[request.field] = array
    return out
