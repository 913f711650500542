"""What is shown of a pair: as it is stored, and what a training step makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from clipkit.config import Config
from clipkit.data.decode import Preprocess, read_picture
from clipkit.data.members import Unreadable, picture_bytes, read_sheet
from clipkit.data.plan import Plan
from clipkit.data.reader import Online, Reader
from clipkit.data.shards import Index

Negative = dict[str, Any]
"""{"text", "kind", ...} as it is stored."""


@dataclass
class Drawn:
    """A row of a training batch: the captions that were drawn, negatives in their order, what the tower is given."""

    caption: str
    positives: list[str]
    negatives: list[Negative]
    group: int
    picture: Image.Image
    step: int
    epoch: int


@dataclass
class Shown:
    """A pair as it is stored; without picture and captions where `problem` says why it cannot be used."""

    id: int
    where: str
    """shard/key."""
    members: dict[str, int]
    """Bytes by suffix."""
    problem: str = ""
    note: str = ""
    picture: Image.Image | None = None
    captions: list[str] = field(default_factory=list)
    negatives: list[list[Negative]] = field(default_factory=list)
    """One list a caption, as far as the shard has them."""
    group: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    drawn: Drawn | None = None

    def negatives_of(self, caption: int) -> list[Negative]:
        """The stored negatives of one caption."""
        return self.negatives[caption] if caption < len(self.negatives) else []

    def to_json(self) -> dict[str, Any]:
        """Plain names, texts and numbers; sizes of pictures as "WxH"."""
        out: dict[str, Any] = {"id": self.id, "where": self.where, "members": self.members}
        out |= {name: value for name in ("problem", "note") if (value := getattr(self, name))}
        if self.picture:
            out |= {"picture": size_of(self.picture), "captions": self.captions, "negatives": self.negatives}
            out |= {"group": self.group, "extra": self.extra}
        if self.drawn:
            out["drawn"] = vars(self.drawn) | {"picture": size_of(self.drawn.picture)}
        return out


@dataclass
class Sheet:
    """Pairs under a headline; `about` says which they are."""

    title: str
    about: str
    pairs: list[Shown]

    def kinds(self) -> Counter[str]:
        """Negatives on the sheet by kind, the commonest first."""
        lists = [[p.drawn.negatives] if p.drawn else p.negatives for p in self.pairs]
        count = Counter(str(n.get("kind") or "no kind") for pair in lists for some in pair for n in some)
        return Counter(dict(count.most_common()))


def size_of(picture: Image.Image) -> str:
    """WxH."""
    return f"{picture.width}x{picture.height}"


def stored_pairs(
    patterns: str | Path | Sequence[str | Path], n: int = 3, start: int = 0, random: int | None = None
) -> tuple[list[Shown], int]:
    """(`n` pairs from `start` on, or as many of those as the seed `random` chooses; how many pairs there are)."""
    index = Index.load(patterns, on_error="skip")
    return [_stored(index, id) for id in _choose(range(len(index)), n, start, random)], len(index)


def drawn_pairs(
    config: Config,
    preprocess: Preprocess,
    step: int = 0,
    n: int = 3,
    start: int = 0,
    random: int | None = None,
    online: Online | None = None,
) -> list[Shown]:
    """Rows of the global batch of `step` of the run that `config` describes, read by the loader's own reader.

    `preprocess` is the image tower's, `online` makes the online negatives. A pair that cannot be read has a `problem`
    where it would end the run, and the pair that takes its place with `data.on_error: skip`. Raises UserError for data
    that training refuses as well.
    """
    data = config.data
    if data.cache_image_features:  # the tower has seen each picture once, by the evaluation transform
        data = data.model_copy(update={"augment": "none"})
    index = Index.load(data.train, on_error=data.on_error)
    plan = Plan(index, batch_size=config.batch_size, seed=config.seed, lanes=data.lanes)
    reader = Reader(index, plan.ranges, data, preprocess, config.seed, features=None, online=online)
    ids, (epoch, *_) = plan.rows(step)
    return [_drawn(reader, id, step, int(epoch), step / config.steps) for id in _choose(ids.tolist(), n, start, random)]


def _choose(ids: Sequence[int], n: int, start: int, random: int | None) -> list[int]:
    left = ids[start:]
    return list(left[:n]) if random is None else Random(random).sample(left, min(n, len(left)))


def _stored(index: Index, id: int) -> Shown:
    shown = Shown(id, index.where(id), {})
    try:
        members = index.read(id)
        shown.members = {suffix: len(data) for suffix, data in members.items()}
        sheet = read_sheet(members)
        shown.captions, shown.negatives, shown.group, shown.extra = (
            sheet.captions,
            sheet.negatives,
            sheet.group,
            sheet.extra,
        )
        shown.picture = read_picture(picture_bytes(members)[1])
    except Unreadable as reason:
        shown.problem = str(reason)
    return shown


def _drawn(reader: Reader, id: int, step: int, epoch: int, progress: float) -> Shown:
    skipped: list[tuple[str, str]] = []
    try:
        row = reader.row(id, epoch, progress)
    except Unreadable as reason:
        if reader.data.on_error == "raise":
            shown = _stored(reader.index, id)
            shown.problem = f"ends the run: {reason}"
            return shown
        row = reader.usable(id, epoch, skipped, progress)
    shown = _stored(reader.index, row.id)
    shown.note = "; ".join(f"takes the place of {where}: {reason}" for where, reason in skipped)
    picture = Image.fromarray(row.picture.permute(1, 2, 0).numpy())
    shown.drawn = Drawn(row.caption, row.positives, row.negatives, row.group, picture, step, epoch)
    return shown
