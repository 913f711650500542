"""Pictures that a model is shown beside their captions, as HQ-CLIP's is (arXiv 2507.22431)."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from clipkit.data.build import encode_jpeg
from clipkit.data.decode import read_picture
from clipkit.data.members import PICTURES, SHEETS, Unreadable, picture_bytes, read_sheet
from clipkit.data.shards import Index

MIME = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp"}
PATCH = 28
"""Pixels a side of what Qwen2-VL, HQ-CLIP's model, takes for a token: what `estimate` counts until servers have."""


class Album:
    """The pictures of shards by their marks. None is kept: one that is sent is read from its shard again.

    `side`: pixels that a sent picture has at most on its longer side; smaller ones go as they are.
    """

    def __init__(self, shards: str | Path | Sequence[str | Path], side: int):
        self.side = side
        self._index = Index.load(shards)
        self._places: dict[str, int] = {}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every (caption, mark of its picture); pairs that cannot be read are passed over, as for `captions_of`."""
        for id in range(len(self._index)):
            with suppress(Unreadable):
                members = self._index.read(id, (*SHEETS, *PICTURES))
                captions, mark = read_sheet(members).captions, self.mark(members)
                self._places.setdefault(mark, id)
                for caption in captions:
                    yield caption, mark

    def mark(self, members: Mapping[str, bytes]) -> str:
        """Names a pair's picture as it is sent: a digest of its bytes, and the side."""
        return f"{blake2b(picture_bytes(members)[1], digest_size=8).hexdigest()}-{self.side}"

    def url(self, mark: str) -> str:
        """The picture as a data URL. Raises Unreadable for one that is none."""
        suffix, data = picture_bytes(self._index.read(self._places[mark], PICTURES))
        picture = read_picture(data)
        if max(picture.size) > self.side:
            picture.thumbnail((self.side, self.side))
            suffix, data = "jpg", encode_jpeg(picture)
        return f"data:image/{MIME[suffix]};base64,{base64.b64encode(data).decode()}"

    @property
    def tokens(self) -> int:
        """About as many as a picture takes at most."""
        return (self.side // PATCH) ** 2
