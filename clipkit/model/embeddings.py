"""`Embeddings`: what the towers hand to the objective.

Axes: n pairs, k negative captions, j negative pictures, p positives (further captions), v further views, w words of the
vocabulary of tags, d; h further projections of width a, each with (axis b) what tells its temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UserError

_ROLES = {
    "image": "n d",
    "text": "n d",
    "positive_text": "n p d",
    "negative_text": "n k d",
    "negative_image": "n j d",
    "tag_logits": "n w",
    "view_image": "n v d",
    "local_logit": "n",
    "negative_local_logit": "n k",
    "image_aspects": "n h b a",
    "text_aspects": "n h b a",
}
_BESIDE = {
    "valid": "n k",
    "positive_valid": "n p",
    "negative_image_valid": "n j",
    "negative_kind": "n k",
    "negative_weight": "n k",
    "relevance": "n",
    "tags": "n w",
    "label": "n",
    "id": "n",
    "group": "n",
}
_MARKS = {"negative_text": "valid", "positive_text": "positive_valid", "negative_image": "negative_image_valid"}
"""Which of a ragged role's places are filled; all of them where it is not said."""
_BLANKS = {
    "negative_text": 0, "negative_image": 0, "valid": False, "negative_image_valid": False, "negative_kind": -1,
    "negative_weight": 1,
}  # fmt: skip
"""What stands for negatives that a pair does not have."""
_OF_THE_PICTURE = ("image", "id", "group", "relevance", "label", "view_image")
"""What a pair's further captions share with it."""


@dataclass
class Embeddings:
    """Unit-length embeddings by role; a negative belongs to the pair of its row (axis n), whatever surrounds it.

    `valid` marks the negative captions that exist (default: all), `positive_valid` and `negative_image_valid` the
    further captions of the picture and the negative pictures; picture j shows what negative caption j says.
    `view_image` are further views of the picture; `local_logit` says how well the caption's words find themselves in
    its patches (`clipkit.model.local`, scale included), `negative_local_logit` the same of its negatives.
    `negative_kind` numbers the kinds of negatives, `negative_weight` (≥ 0) says how much each counts in a softmax that
    it is a rival in (`infonce`, `igc`, `tgc`), `relevance` (≥ 0) says how well a caption fits. `id` is the dense
    number of the sample and `group` that of its picture: pairs with equal group are never each other's negatives. Left
    out, `group` is `id` and `id` counts the rows, going on from rank to rank. `scale` is the multiplicative factor
    1/temperature, not its logarithm. `teacher` holds the same roles of the same pairs; terms never send a gradient into
    it; what no term looks at, even image or text, may be None there. `replicated` says that every rank holds these same
    tables, so that ranks may divide work on them.

    `tag_logits` is what a tag head says of each picture, `tags` which words it has; where it has none, nothing is known
    of it. `image_aspects` and `text_aspects` are what `clipkit.model.heads.Aspects` makes of the pairs. `label` is the
    number of a picture's class, -1 without one.

    Raises UserError when the shapes do not belong together.
    """

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n d"]
    negative_text: Float[Tensor, "n k d"] | None = None
    negative_image: Float[Tensor, "n j d"] | None = None
    positive_text: Float[Tensor, "n p d"] | None = None
    view_image: Float[Tensor, "n v d"] | None = None
    local_logit: Float[Tensor, " n"] | None = None
    negative_local_logit: Float[Tensor, "n k"] | None = None
    image_aspects: Float[Tensor, "n h b a"] | None = None
    text_aspects: Float[Tensor, "n h b a"] | None = None
    valid: Bool[Tensor, "n k"] | None = None
    positive_valid: Bool[Tensor, "n p"] | None = None
    negative_image_valid: Bool[Tensor, "n j"] | None = None
    negative_kind: Int64[Tensor, "n k"] | None = None
    negative_weight: Float[Tensor, "n k"] | None = None
    relevance: Float[Tensor, " n"] | None = None
    tag_logits: Float[Tensor, "n w"] | None = None
    tags: Bool[Tensor, "n w"] | None = None
    label: Int64[Tensor, " n"] | None = None
    id: Int64[Tensor, " n"] = None  # type: ignore[assignment]  # filled in below
    group: Int64[Tensor, " n"] = None  # type: ignore[assignment]  # filled in below
    scale: Tensor | float = 1.0
    bias: Tensor | float | None = None
    teacher: Embeddings | None = None
    replicated: bool = False

    def __post_init__(self) -> None:
        self._check_shapes()
        n, device = len(self), self._rows.device
        if self.id is None:
            self.id = torch.arange(n, device=device) + distributed.rank() * n
        if self.group is None:
            self.group = self.id
        for role, mark in _MARKS.items():
            table = getattr(self, role)
            if table is not None and getattr(self, mark) is None:
                setattr(self, mark, torch.ones(table.shape[:2], dtype=torch.bool, device=device))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def width(self) -> int:
        """Of one embedding: d."""
        return self._rows.shape[-1]

    @property
    def _rows(self) -> Tensor:
        return self.text if self.image is None else self.image

    @property
    def negatives(self) -> tuple[Float[Tensor, "n k d"], Bool[Tensor, "n k"]]:
        """Negative captions and which of them exist; k is 0 when the pairs have none."""
        if self.negative_text is None or self.valid is None:
            n, d = self.text.shape
            return self.text.new_zeros(n, 0, d), torch.zeros(n, 0, dtype=torch.bool, device=self.text.device)
        return self.negative_text, self.valid

    @property
    def negative_log_weight(self) -> Float[Tensor, "n k"]:
        """What a softmax adds to the logits of negative captions: log of their weight, -inf for those not there."""
        valid = self.negatives[1]
        weight = valid.float() if self.negative_weight is None else self.negative_weight.masked_fill(~valid, 0.0)
        return weight.log()

    def with_positives(self) -> Embeddings:
        """Every further caption as a pair of its own behind the others: its picture, group and class, no negatives.

        Tags and aspects stay behind: they are said once of each pair.
        """
        if self.positive_text is None or self.positive_valid is None:
            return self
        row, place = self.positive_valid.nonzero(as_tuple=True)
        more = {name: x[row] for name in _OF_THE_PICTURE if (x := getattr(self, name)) is not None}
        more["text"] = self.positive_text[row, place]
        for name, blank in _BLANKS.items():
            if (x := getattr(self, name)) is not None:
                more[name] = x.new_full((len(row), *x.shape[1:]), blank)
        apart = (
            "positive_text",
            "positive_valid",
            "local_logit",
            "negative_local_logit",
            "image_aspects",
            "text_aspects",
            "tag_logits",
            "tags",
            "teacher",
        )
        alone = replace(self, **dict.fromkeys(apart))
        teacher = self.teacher and self.teacher.with_positives()
        joined = {name: torch.cat([getattr(alone, name), x]) for name, x in more.items()}
        return replace(alone, **joined, teacher=teacher)

    def frozen_teacher(self, *roles: str) -> Embeddings:
        """The teacher's embeddings, cut off from its graph. Raises UserError without teacher or one of the `roles`."""
        if self.teacher is None:
            raise UserError("this term needs embeddings.teacher and found none; set teacher.kind to ema or frozen")
        if missing := [role for role in roles if getattr(self.teacher, role) is None]:
            raise UserError(f"this term needs the teacher's {missing[0]} and found none; see teacher.towers")
        tables = {name: getattr(self.teacher, name) for name in _ROLES}
        return replace(self.teacher, **{name: x.detach() for name, x in tables.items() if x is not None})

    @staticmethod
    def join(parts: list[Embeddings]) -> Embeddings:
        """The rows of several, one after the other; scale and bias are those of the first."""
        names = [name for name in (*_ROLES, *_BESIDE) if getattr(parts[0], name) is not None]
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def leaves(self) -> dict[str, Tensor]:
        """What a gradient can arrive at, by name: the roles' tables, and scale and bias where they are tensors."""
        return {name: x for name in (*_ROLES, "scale", "bias") if isinstance(x := getattr(self, name), Tensor)}

    def world(self) -> Embeddings:
        """The same tables over all ranks, in rank order, each role gathered once: with gradient, the teacher without.

        Every rank needs equal shapes. Alone, returns itself.
        """
        if not distributed.active():
            return self
        beside, teacher = self._gather(_BESIDE), self.teacher
        if teacher:
            with torch.no_grad():
                teacher = replace(teacher, **teacher._gather(_ROLES) | beside)
        return replace(self, **self._gather(_ROLES) | beside, teacher=teacher, replicated=True)

    def _gather(self, names: dict[str, str]) -> dict[str, Tensor]:
        tables = {name: getattr(self, name) for name in names}
        return {name: distributed.all_gather(table) for name, table in tables.items() if table is not None}

    def _check_shapes(self) -> None:
        axes: dict[str, int] = {}
        for name, layout in (_ROLES | _BESIDE).items():
            table = getattr(self, name)
            if table is None:
                continue
            names, shape = layout.split(), tuple(table.shape)
            if len(shape) != len(names) or any(axes.setdefault(a, s) != s for a, s in zip(names, shape, strict=True)):
                found = ", ".join(f"{axis}={size}" for axis, size in axes.items())
                raise UserError(f"embeddings.{name}: should be [{layout}] with {found}, got shape {shape}")
