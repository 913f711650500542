"""The stream: global steps of a plan into this rank's batches, decoded, augmented and tokenised by worker processes.

What a sample becomes (its caption, negatives and crop) is keyed by (seed, epoch, id) alone, so that batches are the
same for any number of workers and ranks and wherever one starts. Axes: n pairs, k negatives, t tokens, s pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkit.config import DataConfig
from clipkit.data.augment import random_crop
from clipkit.data.batch import Batch
from clipkit.data.decode import Preprocess, fit, read_pixels
from clipkit.data.features import FeatureStore
from clipkit.data.members import SHEETS, Sheet, Unreadable, picture_bytes, read_sheet
from clipkit.data.mixture import Mixture
from clipkit.data.plan import Plan
from clipkit.data.seeds import bits, shuffled
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError

PATIENCE = 1000
"""So many unreadable samples in a row are no accident: the data is wrong."""
FIRST = 64
"""Pairs read ahead of everything else, so that what is wrong with the data is said at once."""
NAMED_GROUP = 1 << 62
"""Numbers of named groups start here; a pair without a group is its own, numbered by its id."""


@dataclass
class Row:
    """One pair of the batch, before it is stacked."""

    id: int
    group: int
    caption: str
    negatives: list[str]
    picture: Tensor
    """Pixels [3 s s], or stored features [f]."""


class Loader:
    """Batches of one rank. Raises UserError when the global batch does not divide evenly over the ranks."""

    def __init__(
        self,
        index: Index,
        plan: Plan | Mixture,
        *,
        data: DataConfig,
        preprocess: Preprocess,
        tokenizer: Tokenizer,
        seed: int,
        rank: int = 0,
        world: int = 1,
        features: FeatureStore | np.ndarray | None = None,
    ):
        if plan.batch_size % world:
            raise UserError(f"batch_size: {plan.batch_size} pairs cannot be split evenly over {world} ranks")
        self.workers = data.workers
        self._steps = _Steps(
            plan, rank, world, _Reader(index, plan.ranges, data, preprocess, seed, features), tokenizer
        )

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the global steps start ... stop-1, over as many epochs as that takes.

        The workers live from the first to the last of them. Raises UserError at an unreadable sample
        (`data.on_error: raise`).
        """
        loader = DataLoader(
            self._steps,
            sampler=range(start, stop),
            batch_size=None,
            num_workers=min(self.workers, stop - start),
            collate_fn=_as_it_is,
            worker_init_fn=_one_thread,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: the loader must not draw from the generator that training uses
        )
        for item in loader:
            if isinstance(item, UserError):
                raise item
            yield item


def check_first(index: Index, plan: Plan | Mixture, data: DataConfig) -> None:
    """Read the first FIRST pairs of `plan`; raises UserError at an unreadable one (`data.on_error: raise`)."""
    if data.on_error == "raise":
        reader = _Reader(index, plan.ranges, data, Preprocess(), seed=0, features=None)
        for id in plan.rows(0)[0][:FIRST].tolist():
            reader.usable(id, 0, [])


class _Steps(Dataset):
    """Global step → this rank's slice of the global batch."""

    def __init__(self, plan: Plan | Mixture, rank: int, world: int, reader: _Reader, tokenizer: Tokenizer):
        self.plan, self.reader, self.tokenizer = plan, reader, tokenizer
        share = plan.batch_size // world
        self.slice = slice(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> Batch | UserError:
        ids, epochs = (numbers[self.slice].tolist() for numbers in self.plan.rows(step))
        skipped: list[tuple[str, str]] = []
        try:
            rows = [self.reader.usable(id, epoch, skipped) for id, epoch in zip(ids, epochs)]
        except UserError as error:
            return error  # raised in a worker it would arrive wrapped in a traceback
        return self._stack(rows, skipped)

    def _stack(self, rows: list[Row], skipped: list[tuple[str, str]]) -> Batch:
        k = self.reader.data.negatives
        texts = [row.caption for row in rows]
        for row in rows:
            texts += row.negatives + [""] * (k - len(row.negatives))
        tokens = self.tokenizer(texts)
        text, negative_text = tokens[: len(rows)], tokens[len(rows) :].unflatten(0, (len(rows), k)) if k else None
        valid = None
        if negative_text is not None:
            valid = torch.tensor([[j < len(row.negatives) for j in range(k)] for row in rows])
            negative_text[~valid] = 0
        stored = self.reader.features is not None
        pictures = torch.stack([row.picture for row in rows])
        return Batch(
            text=text,
            id=torch.tensor([row.id for row in rows]),
            group=torch.tensor([row.group for row in rows]),
            image=None if stored else pictures,
            image_features=pictures if stored else None,
            negative_text=negative_text,
            valid=valid,
            skipped=skipped,
        )


@dataclass
class _Reader:
    """Sample id and epoch → the row it becomes."""

    index: Index
    ranges: list[range]
    """Ids of each source; an unreadable pair is replaced by one of its own."""
    data: DataConfig
    preprocess: Preprocess
    seed: int
    features: FeatureStore | np.ndarray | None

    def usable(self, id: int, epoch: int, skipped: list[tuple[str, str]]) -> Row:
        """The row of `id`, or of the next readable id of its source (cyclic), noting each that is not."""
        home = next(span for span in self.ranges if id in span)
        for turn in range(min(PATIENCE, len(home))):
            candidate = home[(id - home.start + turn) % len(home)]
            try:
                return self.row(candidate, epoch)
            except Unreadable as reason:
                if self.data.on_error == "raise":
                    shard = self.index.shards[self.index.locate(candidate)[0]]
                    raise UserError(
                        f"{shard}: {self.index.key(candidate)}: {reason}; "
                        "mend the shard (clipkit shards check), or set data.on_error: skip"
                    ) from None
                skipped.append((self.index.where(candidate), str(reason)))
        raise UserError(f"{self.index.where(id)}: unreadable, and so are all that follow it: {skipped[-1][1]}")

    def row(self, id: int, epoch: int) -> Row:
        """Raises Unreadable."""
        members = self.index.read(id, SHEETS if self.features is not None else None)
        sheet = read_sheet(members)
        chosen = self._caption(sheet, id, epoch)
        negatives = draw_negatives(sheet.negatives_of(chosen), self.data.negatives, self.seed, "negatives", epoch, id)
        return Row(id, group_number(sheet, id), sheet.captions[chosen], negatives, self._picture(members, id, epoch))

    def _caption(self, sheet: Sheet, id: int, epoch: int) -> int:
        usable = sheet.usable()
        if self.data.caption == "first":
            return usable[0]
        return usable[int(bits(1, self.seed, "caption", epoch, id)[0] % len(usable))]

    def _picture(self, members: dict[str, bytes], id: int, epoch: int) -> Tensor:
        if self.features is not None:
            row = torch.from_numpy(np.array(self.features[id]))
            if row.isnan().any():
                raise Unreadable("unreadable picture: it was when its features were stored")
            return row
        pixels = read_pixels(picture_bytes(members)[1])
        if self.data.augment == "none":
            return fit(pixels, self.preprocess)
        return random_crop(pixels, self.preprocess, self.data.crop_scale, self.seed, "crop", epoch, id)


def draw_negatives(negatives: list[dict[str, Any]], k: int, *key: int | str) -> list[str]:
    """At most `k` texts, uniform over the kinds present, none twice; random numbers are named by `key`.

    Kinds take turns in a random order, each giving its texts in a random order, until `k` are drawn or none is left.
    """
    if not k:
        return []
    kinds: dict[str, list[str]] = {}
    for position in shuffled(len(negatives), *key, "texts"):
        negative = negatives[position]
        if negative["text"].strip():
            kinds.setdefault(str(negative.get("kind", "")), []).append(negative["text"])
    names = sorted(kinds)
    queues = [kinds[names[turn]] for turn in shuffled(len(names), *key, "kinds")]
    rounds = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(rounds) for queue in queues if turn < len(queue)][:k]


def group_number(sheet: Sheet, id: int) -> int:
    """The picture's number (int64): of its `group` where it has one, the pair's own id otherwise."""
    if sheet.group is None:
        return id
    return NAMED_GROUP | int(bits(1, "group", sheet.group)[0]) >> 2


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)  # the ranks' workers share the cores; a forked pool of threads would not run anyway
