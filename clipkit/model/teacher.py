"""The model self-distillation looks up to: a frozen copy of the student's start, or a moving average of its weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from clipkit.config import TeacherConfig
from clipkit.data.batch import Batch
from clipkit.errors import UserError
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.embeddings import Embeddings


class Teacher:
    """A float32 copy of the student in eval mode, without gradient.

    `ema`: after every step taken, teacher ← decay · teacher + (1 - decay) · student, with
    decay = 0.5 ** (1 / (half_life · steps)), so that the final mixture does not depend on the length of the run
    (DeGLA, arXiv 2504.16801: 0.9996 over 8,090 steps). `frozen`: stays as it began. Running statistics of BatchNorm
    move along with the weights. A locked tower of the student is shared, not copied: it is the same for both, for ever.
    In lower precision a decay near 1 would never move the average, hence float32 whatever the student's type.
    """

    def __init__(self, student: DualEncoder, config: TeacherConfig, steps: int):
        self.moves = config.kind == "ema"
        self.decay = 0.5 ** (1 / (config.half_life * steps))
        shared = student.locked_towers()
        self.model = copy.deepcopy(student, {id(part): part for part in (*shared, student.tokenizer)})
        if "tags" in self.model.heads:
            del self.model.heads["tags"]  # nobody asks a teacher for tags
        self.model.eval().requires_grad_(False)
        theirs = {id(tensor) for tower in shared for tensor in (*tower.parameters(), *tower.buffers())}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in theirs and tensor.is_floating_point():
                tensor.data = tensor.data.float()
        self._own = [name for name, tensor in self._tensors(self.model).items() if id(tensor) not in theirs]

    @staticmethod
    def _tensors(model: DualEncoder) -> dict[str, Tensor]:
        return model.state_dict(keep_vars=True)

    def to(self, device: torch.device | str) -> Teacher:
        """Move to the student's device."""
        self.model.to(device)
        return self

    def embed(self, batch: Batch, parts: int = 1) -> Embeddings:
        """The teacher's view of the batch, every role the student encodes, in `parts`, without gradient.

        Where the student's image tower is locked, hand in `student.with_image_features(batch)`: the trunk runs once.
        """
        with torch.no_grad():
            return Embeddings.join([self.model(part) for part in batch.split(parts)])

    @torch.no_grad()
    def update(self, student: DualEncoder) -> None:
        """Move towards the student; call once per step taken, not on skipped ones. A frozen teacher stays."""
        if not self.moves:
            return
        mine, theirs = self._tensors(self.model), self._tensors(student)
        moving = [name for name in self._own if mine[name].is_floating_point()]
        targets = [theirs[name].float() for name in moving]
        torch._foreach_lerp_([mine[name] for name in moving], targets, 1 - self.decay)  # pyright: ignore
        for name in set(self._own) - set(moving):
            mine[name].copy_(theirs[name])

    def state(self) -> dict[str, Tensor]:
        """The teacher's own tensors, for safetensors; what it shares with the student is left out."""
        tensors = self._tensors(self.model)
        return {name: tensors[name].detach().cpu().contiguous() for name in self._own}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave. Raises UserError when it belongs to another architecture."""
        tensors = self._tensors(self.model)
        if state.keys() != set(self._own) or any(tensors[name].shape != value.shape for name, value in state.items()):
            odd = sorted(state.keys() ^ set(self._own)) or [n for n in state if tensors[n].shape != state[n].shape]
            raise UserError(f"teacher: the saved one is of another architecture, e.g. {odd[0]}")
        for name, value in state.items():
            tensors[name].copy_(value)
