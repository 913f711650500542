"""FSDP2: weights, gradients and moments divided among ranks, each block gathered while it works. arXiv 2304.11277.

Locked towers stay whole on every rank: student and teacher share them. The teacher is divided as the student is:
each rank moves its own part of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from clipkit import distributed
from clipkit.data.batch import Batch
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.embeddings import Embeddings
from clipkit.model.load import alike
from clipkit.model.teacher import Teacher
from clipkit.model.towers import blocks
from clipkit.training.engine import Engine, start_process_group


class ShardingEngine(Engine):
    """`torch.distributed.fsdp.fully_shard` around every block of a learning tower, and around the rest."""

    def host(self, teacher: Teacher) -> None:
        """Take the teacher in, divided like the model."""
        teacher.to(self.device)
        self._divide(teacher.model)

    def clip(self) -> Tensor:
        """Clip the gradient; returns its global norm from before, whole on every rank."""
        return distributed.whole(super().clip())

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, each in full, on the CPU. All ranks ask together."""
        return {name: distributed.gathered(x.detach()).cpu() for name, x in self.bare.state_dict().items()}

    def whole_model(self) -> DualEncoder:
        """A copy with all weights. All ranks ask together."""
        model = alike(self.bare)
        model.load_state_dict(self.weights())
        return model.to(self.device)

    def _join(self) -> torch.device:
        start_process_group(self.world, self.config.engine.timeout_s, needed=True)
        return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.world,))

    def _wrap(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        names = {parameter: name for name, parameter in self.bare.named_parameters()}
        root = Root(self.bare)
        self._divide(root)
        divided = dict(self.bare.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [divided[names[parameter]] for parameter in group["params"]]
        return root, optimizer

    def _divide(self, module: nn.Module) -> None:
        locked = {parameter for tower in self.bare.locked_towers() for parameter in tower.parameters()}
        for block in blocks(module):
            if not locked & set(block.parameters()):
                fully_shard(block, mesh=self._mesh)
        # Also the rest is divided again after a forward: whoever reads weights finds the parts.
        fully_shard(module, mesh=self._mesh, ignored_params=locked, reshard_after_forward=True)

    def _encoder(self) -> Any:
        return self.model

    def _encode(self, batch: Batch) -> Embeddings:
        return self.model(partial(_embeddings, batch))[1]

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        return nullcontext()  # gradients of parts are summed in their parts: the memory of whole ones is what it saves

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        value = super()._moment(parameter, key)
        return None if value is None else distributed.gathered(value)

    def _placed(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        placed = torch.zeros_like(parameter, requires_grad=False)
        distributed.fill(placed, value)
        return placed


class Root(nn.Module):
    """What FSDP gathers weights for: whatever is called through it.

    It hands out what a plain call would, and looks like the model to those who encode single pictures and texts.
    """

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[DualEncoder], Any]) -> Any:
        return call(self.model)

    def encode_image(self, image: Tensor) -> Tensor:
        """As `DualEncoder.encode_image`."""
        return self(lambda model: model.encode_image(image))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """As `DualEncoder.encode_text`."""
        return self(lambda model: model.encode_text(tokens))

    @property
    def scale(self) -> Tensor:
        """As `DualEncoder.scale`."""
        return self(lambda model: model.scale)


def _embeddings(batch: Batch, model: DualEncoder) -> tuple[dict[str, Tensor], Embeddings]:
    """The embeddings, and before them the tensors that a gradient arrives at, where FSDP looks for them: no views."""
    z = model(batch)
    leaves = {name: x.clone() if x._base is not None else x for name, x in z.leaves().items()}
    return leaves, replace(z, **leaves)
