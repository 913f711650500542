"""Sample id and epoch → the row of the batch it becomes: captions, negatives, pictures.

What is drawn is keyed by (seed, epoch, id) alone: the same for any number of workers and ranks. Axes: f features,
s pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clipkit.data.augment import random_view
from clipkit.data.decode import Preprocess, View, decode_views, whole
from clipkit.data.features import FeatureStore
from clipkit.data.members import (
    Sheet,
    Unreadable,
    label_of,
    negative_picture,
    picture_bytes,
    read_sheet,
    tags_of,
)
from clipkit.data.seeds import bits, shuffled, uniform
from clipkit.data.shards import Index
from clipkit.data.stored import Wanted, requests, stored_rows
from clipkit.data.tags import vocabulary
from clipkit.errors import UserError
from clipkit.settings import DataConfig

START = 0.5
"""Share of a caption's negatives, the easiest, that a curriculum begins with."""
PATIENCE = 1000
"""So many unreadable samples in a row are no accident: the data is wrong."""
NAMED_GROUP = 1 << 62
"""Numbers of named groups start here; a pair without a group is its own, numbered by its id. So do those of classes."""


@dataclass
class Row:
    """One pair of the batch, before it is stacked."""

    id: int
    group: int
    caption: str
    picture: Tensor
    """Pixels [3 s s], or stored features [f]."""
    relevance: float = 1.0
    positives: list[str] = field(default_factory=list)
    negatives: list[dict[str, Any]] = field(default_factory=list)
    negative_pictures: list[Tensor | None] = field(default_factory=list)
    """Of the first negatives, in their order; None where a negative has no picture."""
    views: list[Tensor] = field(default_factory=list)
    """Further crops of the picture."""
    alternates: list[str] = field(default_factory=list)
    """Keys of pairs with a similar picture."""
    tags: list[int] = field(default_factory=list)
    """Places in the vocabulary."""
    label: int = -1
    stored: dict[str, Tensor] = field(default_factory=dict)
    """Embeddings out of the shard by their name in `Batch`: [f], of further texts as many rows as there are."""


class Online(Protocol):
    """Negatives made while reading: those of a caption of a sheet, a function of (seed, epoch, id) besides."""

    def __call__(self, sheet: Sheet, caption: int, id: int, epoch: int) -> list[dict[str, Any]]: ...


@dataclass
class Reader:
    """Reads and draws; holds no state of its own, so that workers may each have a copy."""

    index: Index
    ranges: list[range]
    """Ids of each source; an unreadable pair is replaced by one of its own."""
    data: DataConfig
    preprocess: Preprocess
    seed: int
    features: FeatureStore | np.ndarray | None
    teacher_roles: Sequence[str] = ()
    """What a precomputed teacher is asked for."""
    online: Online | None = None
    """Makes `data.online_negatives`."""

    def __post_init__(self) -> None:
        self._requests = requests(self.data, self.teacher_roles)
        self.wanted = Wanted(self.features is None, frozenset(request.member for request in self._requests))
        """The members of a pair that are read."""
        self._ids = self.index.ids() if self.data.alternates else {}

    def rows(
        self, ids: Sequence[int], epochs: Sequence[int], skipped: list[tuple[str, str]], progress: float = 1.0
    ) -> list[Row]:
        """The `usable` rows of these ids; with `data.alternates` a similar pair of each behind them, in their order.

        `progress`: the share of the run that is done, for a curriculum.
        """
        rows = [self.usable(id, epoch, skipped, progress) for id, epoch in zip(ids, epochs)]
        if self.data.alternates:
            similar = [self.alternate(row, epoch) for row, epoch in zip(rows, epochs)]
            rows += [self.usable(id, epoch, skipped, progress) for id, epoch in zip(similar, epochs)]
        return rows

    def alternate(self, row: Row, epoch: int) -> int:
        """The id of one of the row's `alternates`, drawn anew each epoch. Raises UserError when it names none here."""
        here = [self._ids[key] for key in row.alternates if key in self._ids]
        if not here:
            raise UserError(
                f"{self.index.where(row.id)}: data.alternates needs the key of a similar pair of data.train, "
                f"found {row.alternates}; write `alternates` into KEY.json (docs/shards.md)"
            )
        return here[int(bits(1, self.seed, "alternate", epoch, row.id)[0] % len(here))]

    def usable(self, id: int, epoch: int, skipped: list[tuple[str, str]], progress: float = 1.0) -> Row:
        """The row of `id`, or of the next readable id of its source (cyclic), noting each that is not."""
        home = next(span for span in self.ranges if id in span)
        for turn in range(min(PATIENCE, len(home))):
            candidate = home[(id - home.start + turn) % len(home)]
            try:
                return self.row(candidate, epoch, progress)
            except Unreadable as reason:
                if self.data.on_error == "raise":
                    shard = self.index.shards[self.index.locate(candidate)[0]]
                    raise UserError(
                        f"{shard}: {self.index.key(candidate)}: {reason}; "
                        "mend the shard (clipkit shards check), or set data.on_error: skip"
                    ) from None
                skipped.append((self.index.where(candidate), str(reason)))
        raise UserError(f"{self.index.where(id)}: unreadable, and so are all that follow it: {skipped[-1][1]}")

    def row(self, id: int, epoch: int, progress: float = 1.0) -> Row:
        """Raises Unreadable, and UserError where the shard lacks the scores that a policy goes by."""
        members = self.index.read(id, self.wanted)
        sheet = read_sheet(members)
        chosen = self._caption(sheet, id, epoch)
        found = sheet.negatives_of(chosen)
        made = self.online(sheet, chosen, id, epoch) if self.online else []
        negatives = self._negatives(found, made, id, epoch, progress)
        picture, *views = self._pictures(members, id, epoch)
        positives = self._positives(sheet, chosen, id, epoch)
        places = _places(sheet, chosen, positives, negatives)
        stored = stored_rows(members, sheet, self._requests, places)
        return Row(
            id,
            group_number(sheet, id),
            sheet.captions[chosen],
            picture,
            sheet.relevance[chosen],
            [positive["text"] for positive in positives],
            negatives,
            [self._negative_picture(members, n, id, epoch) for n in negatives[: self.data.negative_images]],
            views,
            alternates=sheet.extra.get("alternates", []),
            tags=self._tags(sheet),
            label=label_number(sheet) if self.data.labels else -1,
            stored={name: torch.from_numpy(rows) for name, rows in stored.items()},
        )

    def _caption(self, sheet: Sheet, id: int, epoch: int) -> int:
        kinds = self.data.caption_kinds
        usable = [c for c in sheet.usable() if not kinds or kinds.get(sheet.caption_kinds[c])]
        if not usable:
            found = sorted({sheet.caption_kinds[c] or "without a kind" for c in sheet.usable()})
            raise Unreadable(f"no caption of the wanted kinds: wanted {', '.join(kinds)}, found {', '.join(found)}")
        if self.data.caption == "first" or len(usable) == 1:
            return usable[0]
        if self.data.caption == "all":
            turn, which = divmod(epoch, len(usable))
            return usable[shuffled(len(usable), self.seed, "captions", turn, id)[which]]
        if kinds:
            weights = np.cumsum([kinds[sheet.caption_kinds[c]] for c in usable])
            draw = uniform(1, self.seed, "caption", epoch, id)[0] * weights[-1]
            return usable[int(np.searchsorted(weights, draw, side="right"))]
        return usable[int(bits(1, self.seed, "caption", epoch, id)[0] % len(usable))]

    def _positives(self, sheet: Sheet, chosen: int, id: int, epoch: int) -> list[dict[str, Any]]:
        wanted = self.data.positive_kinds
        others = [
            {"text": sheet.captions[c], "kind": sheet.caption_kinds[c], "caption": c}
            for c in sheet.usable()
            if c != chosen and (not wanted or sheet.caption_kinds[c] in wanted)
        ]
        drawn = draw(others, self.data.positives, self.seed, "positives", epoch, id)
        # In the order of the kinds that are named, so that a place means the same in every pair.
        return sorted(drawn, key=lambda other: wanted.index(other["kind"])) if wanted else drawn

    def _negatives(
        self, negatives: list[dict[str, Any]], made: list[dict[str, Any]], id: int, epoch: int, progress: float
    ) -> list[dict[str, Any]]:
        """K of the shard's and those made while reading, by the policy."""
        wanted, policy = self.data.negative_kinds, self.data.negative_policy
        if wanted:
            negatives = [n for n in negatives if str(n.get("kind", "")) in wanted]
        if policy != "uniform" and not all("score" in n for n in negatives):
            raise UserError(
                f"{self.index.where(id)}: data.negative_policy: {policy} goes by each negative's score, found one "
                "without; clipkit negatives score MODEL SHARDS --out DIR writes it"
            )
        if policy == "hardest":
            return self._pictured(hardest(negatives, self.data.negatives, self.seed, "negatives", epoch, id))
        if policy == "curriculum":
            negatives = easiest(negatives, START + (1 - START) * progress)
        drawn = draw([*negatives, *made], self.data.negatives, self.seed, "negatives", epoch, id)
        return self._pictured(drawn)

    def _pictured(self, drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Those with a picture come first, so that picture j belongs to negative caption j.
        return sorted(drawn, key=lambda n: "picture" not in n) if self.data.negative_images else drawn

    def _tags(self, sheet: Sheet) -> list[int]:
        if not self.data.tags:
            return []
        places = vocabulary(self.data.tags)
        return [places[word] for word in tags_of(sheet) if word in places]

    def _pictures(self, members: dict[str, bytes], id: int, epoch: int) -> list[Tensor]:
        """The pair's own, or its stored features, then further views."""
        if self.features is not None:
            row = torch.from_numpy(np.array(self.features[id]))
            if row.isnan().any():
                raise Unreadable("unreadable picture: it was when its features were stored")
            return [row]
        views = [self._crop(self.data.view_scale, "view", epoch, id, place) for place in range(self.data.views)]
        return self._pixels(picture_bytes(members)[1], self._shown("crop", epoch, id), *views)

    def _negative_picture(
        self, members: dict[str, bytes], negative: dict[str, Any], id: int, epoch: int
    ) -> Tensor | None:
        if "picture" not in negative:
            return None
        number = negative["picture"]
        return self._pixels(negative_picture(members, number), self._shown("negative crop", epoch, id, number))[0]

    def _pixels(self, data: bytes, *views_of: Callable[[int, int], View]) -> list[Tensor]:
        return decode_views(data, views_of, self.preprocess, scaled=self.data.decode == "scaled")

    def _shown(self, *key: int | str) -> Callable[[int, int], View]:
        if self.data.augment == "none":
            return partial(whole, preprocess=self.preprocess)
        return self._crop(self.data.crop_scale, *key)

    def _crop(self, scale: float, *key: int | str) -> Callable[[int, int], View]:
        return lambda height, width: random_view(height, width, self.preprocess.size, scale, self.seed, *key)


def _places(
    sheet: Sheet, chosen: int, positives: list[dict[str, Any]], negatives: list[dict[str, Any]]
) -> dict[str, list[int]]:
    """Which rows of stored embeddings the drawn texts are."""
    before = sum(len(group) for group in sheet.negatives[:chosen])
    # By identity: two negatives may say the same.
    own = {id(negative): before + place for place, negative in enumerate(sheet.negatives_of(chosen))}
    return {
        "text": [chosen],
        "positive_text": [positive["caption"] for positive in positives],
        "negative_text": [own[id(negative)] for negative in negatives if id(negative) in own],  # not made just now
    }


def draw(texts: Sequence[dict[str, Any]], k: int, *key: int | str) -> list[dict[str, Any]]:
    """At most `k` of {"text", "kind", ...}, uniform over the kinds present, none twice; numbers are named by `key`.

    Kinds take turns in a random order, each giving its texts in a random order, until `k` are drawn or none is left.
    """
    if not k:
        return []
    kinds: dict[str, list[dict[str, Any]]] = {}
    for position in shuffled(len(texts), *key, "texts"):
        if texts[position]["text"].strip():
            kinds.setdefault(str(texts[position].get("kind", "")), []).append(texts[position])
    names = sorted(kinds)
    queues = [kinds[names[turn]] for turn in shuffled(len(names), *key, "kinds")]
    rounds = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)][:k]


def hardest(texts: Sequence[dict[str, Any]], k: int, *key: int | str) -> list[dict[str, Any]]:
    """The `k` of the highest `score`, the highest first; equal ones in a random order, named by `key`."""
    said = [texts[position] for position in shuffled(len(texts), *key, "texts") if texts[position]["text"].strip()]
    return sorted(said, key=lambda text: -text["score"])[:k]


def easiest(texts: Sequence[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """The share of them with the lowest scores, one at least, in their own order."""
    places = sorted(range(len(texts)), key=lambda place: (texts[place]["score"], place))
    kept = set(places[: max(1, round(share * len(texts)))])
    return [text for place, text in enumerate(texts) if place in kept]


def group_number(sheet: Sheet, id: int) -> int:
    """The picture's number (int64): of its `group` where it has one, the pair's own id otherwise."""
    if sheet.group is None:
        return id
    return NAMED_GROUP | int(bits(1, "group", sheet.group)[0]) >> 2


def label_number(sheet: Sheet) -> int:
    """The class's number (int64): the label itself, or made of the name; -1 without one. Raises Unreadable."""
    label = label_of(sheet)
    if isinstance(label, str):
        return NAMED_GROUP | int(bits(1, "label", label)[0]) >> 2
    return -1 if label is None else label


@lru_cache
def kind_number(kind: str) -> int:
    """The number (int64) of a kind of negative: the same on every rank and in every run."""
    return int(bits(1, "kind", kind)[0]) >> 2
