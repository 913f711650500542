"""What self-distillation looks up to: a moving average of the student, a frozen model, or stored embeddings."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit import distributed
from clipkit.checks import ROLES, teacher_roles
from clipkit.data.batch import Batch
from clipkit.errors import UserError
from clipkit.model.dual_encoder import TEXTS, DualEncoder
from clipkit.model.embeddings import Embeddings
from clipkit.model.load import load
from clipkit.model.pieces import Piece, share
from clipkit.registry import TERMS
from clipkit.settings import TeacherConfig

if TYPE_CHECKING:
    from clipkit.config import Config

HALF_LIFE = 0.214
"""As a fraction of the run, where nothing is said."""


class Teacher:
    """A float32 model in eval mode, without gradient, that embeds the `roles` asked for.

    `ema`: after every step taken, teacher ← decay · teacher + (1 - decay) · student, with
    decay = 0.5 ** (1 / half-life in steps). As a fraction of the run the half-life leaves a final mixture that does not
    depend on the run's length (DeGLA, arXiv 2504.16801: 0.9996 over 8,090 steps). During the warm-up it grows in
    proportion to the steps (as in StyleGAN2-ADA, arXiv 2006.06676, and EDM, arXiv 2206.00364), so that a student that
    begins at random is followed closely and its first weights are forgotten. The decay is a function of the step's
    number: a run that is taken up again goes on with it. Running statistics of BatchNorm move along with the weights.
    In lower precision a decay near 1 would never move the average, hence float32 whatever the student's type.
    `frozen`: stays as it began, a copy of the student or another model. `precomputed`: embeddings out of the batch.

    A locked tower of the student is shared, not copied: it is the same for both, for ever. A tower that no role needs
    is left out. Raises UserError where a model of its own cannot read the student's batches.
    """

    def __init__(
        self,
        student: DualEncoder,
        config: TeacherConfig,
        steps: int,
        *,
        batch_size: int = 1,
        roles: Sequence[str] = ROLES,
        as_wide: bool = False,
    ):
        self.moves = config.kind == "ema"
        self.roles = tuple(roles)
        self._half_life, self._warmup = half_life(config, steps, batch_size), config.warmup / batch_size
        self.decay = 0.5 ** (1 / self._half_life)
        self._width = student.spec["embed_dim"] if as_wide else None
        self._stranger = bool(config.start)
        shared: list[nn.Module] = []
        self.model: nn.Module
        if config.kind == "precomputed":
            self.model = StoredEmbeddings()
        elif config.start:
            self.model = _stranger(student, config.start, self.roles)
        else:
            shared = student.locked_towers()
            memo = {id(part): part for part in (*shared, student.tokenizer)}
            memo |= {id(tower): nn.Identity() for tower in _unneeded(student, self.roles)}  # type: ignore[misc]
            self.model = copy.deepcopy(student, memo)
            for name in {"tags", "aspects"} & set(self.model.heads):
                del self.model.heads[name]  # nobody asks a teacher for these
        self.model.eval().requires_grad_(False)
        theirs = {id(tensor) for tower in shared for tensor in (*tower.parameters(), *tower.buffers())}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in theirs and tensor.is_floating_point():
                tensor.data = tensor.data.float()
        self._own = [name for name, tensor in self._tensors(self.model).items() if id(tensor) not in theirs]

    @classmethod
    def of(cls, student: DualEncoder, config: Config) -> Teacher:
        """The teacher of a run: it embeds what the run's terms look at."""
        as_wide = any("teacher_width" in TERMS.entry(term).needs for term in config.objective)
        return cls(
            student,
            config.teacher,
            config.steps,
            batch_size=config.batch_size,
            roles=teacher_roles(config),
            as_wide=as_wide,
        )

    @staticmethod
    def _tensors(model: nn.Module) -> dict[str, Tensor]:
        return model.state_dict(keep_vars=True)

    def to(self, device: torch.device | str) -> Teacher:
        """Move to the student's device."""
        self.model.to(device)
        return self

    def embed(self, batch: Batch, parts: int = 1) -> Embeddings | None:
        """The teacher's view of the batch in `parts`, without gradient; None where no term looks at it.

        Where the student's image tower is locked, hand in `student.with_image_features(batch)`: the trunk runs once.
        Raises UserError where a term compares embeddings with the student's and they are not as wide.
        """
        if not self.roles:
            return None
        if self._stranger:
            batch = replace(batch, image_features=None)  # they are the student's
        with torch.no_grad():
            z = Embeddings.join([self.model(part, self.roles) for part in batch.split(parts)])
        if self._width not in (None, z.width):
            raise UserError(
                f"teacher: its embeddings have {z.width} dimensions, the student's {self._width}; the terms of the "
                "objective compare the two (gist and structure do not)"
            )
        return z

    @torch.no_grad()
    def update(self, student: DualEncoder, step: int = 1) -> None:
        """Move towards the student; call once per step taken, not on skipped ones. A frozen teacher stays.

        `step` is the step's number, from 1; it counts only during the warm-up.
        """
        if not self.moves:
            return
        mine, theirs = self._tensors(self.model), self._tensors(student)
        moving = [name for name in self._own if mine[name].is_floating_point()]
        own = [distributed.part(mine[name]) for name in moving]
        targets = [distributed.part(theirs[name]).float() for name in moving]
        torch._foreach_lerp_(own, targets, 1 - self.decay_at(step))  # pyright: ignore
        for name in set(self._own) - set(moving):
            mine[name].copy_(theirs[name])

    def decay_at(self, step: int) -> float:
        """What remains of the teacher in step `step`, counted from 1."""
        if step >= self._warmup:
            return self.decay
        return 0.5 ** (self._warmup / (self._half_life * step))

    def state(self) -> dict[str, Tensor]:
        """The teacher's own tensors, not copied unless divided among ranks; those shared with the student are left out.

        All ranks ask together.
        """
        tensors = self._tensors(self.model)
        return {name: distributed.gathered(tensors[name].detach()) for name in self._own}

    def pieces(self) -> dict[str, Piece]:
        """Of what `state` gives, this rank's pieces, not copied. No word is exchanged."""
        tensors = self._tensors(self.model)
        return {name: share(tensors[name].detach()) for name in self._own}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave. Raises UserError when it belongs to another architecture."""
        tensors = self._tensors(self.model)
        if self._own and not state:
            raise UserError(
                "teacher: the checkpoint holds none; resume with teacher.kind=none, "
                "or start a new run that begins from the checkpoint with model.start"
            )
        if state.keys() != set(self._own) or any(tensors[name].shape != value.shape for name, value in state.items()):
            odd = sorted(state.keys() ^ set(self._own)) or [n for n in state if tensors[n].shape != state[n].shape]
            raise UserError(f"teacher: the saved one is of another architecture, e.g. {odd[0]}")
        for name, value in state.items():
            distributed.fill(tensors[name], value)


class StoredEmbeddings(nn.Module):
    """A precomputed teacher: the batch's `teacher_...` tables at unit length."""

    def forward(self, batch: Batch, roles: Collection[str]) -> Embeddings:
        """Like a DualEncoder's, for a batch that was read with `data.teacher_features`."""
        stored = {role: getattr(batch, f"teacher_{role}", None) for role in roles}
        tables = {role: F.normalize(x.float(), dim=-1) for role, x in stored.items() if x is not None}
        return Embeddings(
            **{"image": None, "text": None, **tables},  # type: ignore[arg-type]
            valid=batch.valid,
            positive_valid=batch.positive_valid,
            id=batch.id,
            group=batch.group,
        )


def half_life(config: TeacherConfig, steps: int, batch_size: int) -> float:
    """The half-life of the average in steps."""
    if config.half_life_samples is not None:
        return config.half_life_samples / batch_size
    return (HALF_LIFE if config.half_life is None else config.half_life) * steps


def _unneeded(model: DualEncoder, roles: Sequence[str]) -> list[nn.Module]:
    """The towers that encode none of the roles; a teacher that nothing looks at is averaged as a whole."""
    image = [model.image_tower, model.image_head]
    text = [model.text_tower]
    return [
        tower
        for towers, their in ((image, ("image", "negative_image")), (text, TEXTS))
        if roles and not set(their) & set(roles)
        for tower in towers
    ]


def _stranger(student: DualEncoder, reference: str, roles: Sequence[str]) -> DualEncoder:
    """Another model as teacher; it gets the student's batches, so it has to read pictures and texts as the student."""
    model = load(reference, "cpu")
    problems = []
    if "image" in roles:
        for name in ("size", "resize", "interpolation"):
            there, here = (getattr(each.preprocess, name) for each in (model, student))
            if there != here:
                problems.append(f"it wants pictures with {name} {there}, the student {here}")
    if set(TEXTS) & set(roles):
        problems += _unreadable_texts(student, model)
    if problems:
        raise UserError(
            f"teacher.start: {reference} cannot read the student's batches: {'; '.join(problems)}; "
            "write its embeddings into the shards instead (clipkit shards embed) and use teacher.kind: precomputed"
        )
    for name, tower in list(model.named_children()):
        if any(tower is unneeded for unneeded in _unneeded(model, roles)):
            setattr(model, name, nn.Identity())
    return model


def _unreadable_texts(student: DualEncoder, model: DualEncoder) -> list[str]:
    """What keeps `model` from reading the texts of the student's batches."""
    there, here = model.tokenizer, student.tokenizer
    if model.reads_features:
        return [] if student.reads_features else ["it reads stored features of texts, the student tokens"]
    if there.name != here.name:
        return [f"it wants texts as tokens of {there.name}, the student of {here.name}"]
    if there.context_length < here.context_length or (not there.trim and here.trim):
        return [f"it wants texts of {there.context_length} tokens, the student up to {here.context_length}"]
    return []
