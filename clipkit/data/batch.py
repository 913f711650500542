"""`Batch`: what the stream hands to the model. Axes: n pairs, k negatives, j negative pictures, p positives, v views,
w words of the vocabulary of tags, t tokens, c h w pixels, f features, d embedding."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor


@dataclass
class Batch:
    """One rank's share of a global batch.

    Pictures travel as uint8 and are normalised by the model on its device. When the image tower is locked and its
    outputs were cached, `image_features` (n f) stand in for `image`. Text is int64 token ids, cut to the longest of
    the batch. `id` is the dense number of the sample in the index, `group` the number of the picture: pairs with
    equal group are never each other's negatives. `valid` marks the negatives that exist (the others are padding).
    `positive_text` are further captions of the same picture. Negative picture j shows what negative caption j says.
    `text_features` and its kin are what a text tower reads that reads no tokens, `teacher_...` what a precomputed
    teacher makes of the pair; both lie in the shards, and rows of places without a text are 0.
    """

    text: Int64[Tensor, "n t"]
    id: Int64[Tensor, " n"]
    group: Int64[Tensor, " n"]
    image: UInt8[Tensor, "n c h w"] | None = None
    image_features: Tensor | None = None
    negative_text: Int64[Tensor, "n k t"] | None = None
    valid: Bool[Tensor, "n k"] | None = None
    negative_kind: Int64[Tensor, "n k"] | None = None
    """`kind_number` of each negative; -1 where there is none."""
    negative_weight: Float[Tensor, "n k"] | None = None
    """What each negative counts (`data.negative_weights`); 1 where the shard says nothing."""
    negative_image: UInt8[Tensor, "n j c h w"] | None = None
    negative_image_valid: Bool[Tensor, "n j"] | None = None
    view_image: UInt8[Tensor, "n v c h w"] | None = None
    """Further crops of the picture."""
    positive_text: Int64[Tensor, "n p t"] | None = None
    positive_valid: Bool[Tensor, "n p"] | None = None
    relevance: Float[Tensor, " n"] | None = None
    """How well the caption fits its picture; 1 where the shard says nothing."""
    tags: Bool[Tensor, "n w"] | None = None
    """Which words of `data.tags` the picture is tagged with; none where nothing is known of it."""
    label: Int64[Tensor, " n"] | None = None
    """The number of the picture's class (`label_number`); -1 where there is none."""
    text_features: Float[Tensor, "n f"] | None = None
    positive_text_features: Float[Tensor, "n p f"] | None = None
    negative_text_features: Float[Tensor, "n k f"] | None = None
    teacher_image: Float[Tensor, "n d"] | None = None
    teacher_text: Float[Tensor, "n d"] | None = None
    teacher_positive_text: Float[Tensor, "n p d"] | None = None
    teacher_negative_text: Float[Tensor, "n k d"] | None = None
    kinds: dict[int, str] = field(default_factory=dict)
    """Names of the numbers in `negative_kind`."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(shard/key, reason) of every sample that could not be read and was replaced (`data.on_error: skip`)."""

    def __len__(self) -> int:
        return len(self.id)

    def split(self, parts: int) -> list[Batch]:
        """The batch in `parts` equal pieces, in order; what was skipped goes with the first."""
        size = len(self) // parts
        assert size * parts == len(self), f"{len(self)} pairs in {parts} parts"
        tables = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return [
            replace(
                self,
                **{name: table[first : first + size] for name, table in tables.items()},
                skipped=self.skipped if not first else [],
            )
            for first in range(0, len(self), size)
        ]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where `to` copies without waiting (called by the loader)."""
        pinned = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)
