"""Engines: how one step is carried out. Here a single process and DDP; `fsdp` and `zero` divide the model among ranks.

All of them have one face, and the same losses come out of each (tests/training/test_topology.py). Traps that this file
exists for (docs/log.md has the measurements): accelerate on CPU under torchrun silently runs unconnected trainings, and
gloo must be asked for by name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit import distributed
from clipkit.checks import check_split
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.errors import UserError
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.embeddings import Embeddings
from clipkit.model.pieces import Piece, share
from clipkit.model.teacher import Teacher
from clipkit.model.weights import weights_into
from clipkit.training.accumulate import EmbeddingCache
from clipkit.training.adversary import attacked
from clipkit.training.optim import MOMENTS
from clipkit.training.scaling import LossScale


class Engine:
    """Holds the wrapped model and optimizer; knows how to run one step on this topology: one process, or DDP."""

    def __init__(self, config: Config):
        self.config = config
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.parts = config.engine.accumulate
        self.scaling = LossScale() if config.engine.precision == "fp16" else None
        check_split(config, self.world)
        self.device: torch.device = self._join()
        self.bare: Any
        """The model as it is without this engine."""
        self.model: nn.Module
        self.optimizer: Any

    def prepare(self, model: DualEncoder, optimizer: torch.optim.Optimizer) -> None:
        """Wrap the model for this topology. Raises UserError where the wrapped model could not be right."""
        if self.parts > 1 and (norms := _learning_norms(model)):
            raise UserError(
                f"engine.accumulate: {len(norms)} batch norms in a learning tower would see parts of the batch; "
                "use accumulate: 1, lock the tower, or a tower with group or layer norm"
            )
        if self.config.engine.checkpoint_activations:
            model.recompute()
        if self.config.engine.compile:
            _compile_towers(model, self.device)
        self.bare = _synchronise_norms(model, self.world, self.device).to(self.device)
        self._running = [buffer for norm in _learning_norms(self.bare) for buffer in norm.buffers()]
        self.model, self.optimizer = self._wrap(optimizer)

    def host(self, teacher: Teacher) -> None:
        """Take the teacher in, beside the model that is prepared."""
        teacher.to(self.device)

    def autocast(self, *, cache: bool = True) -> torch.autocast:
        """Half-precision compute on fp32 parameters when asked for."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.engine.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=cache)

    def embed(self, batch: Batch) -> Embeddings:
        """This rank's embeddings; with `engine.accumulate` only values, whose gradient `backward` takes further.

        With `adversary.eps` of pictures moved against the model; the batch stays as it is.
        """
        self._statistics = [(buffer, buffer.clone()) for buffer in self._running]
        if self.config.adversary.eps:
            # Before pytorch #158232 was mended, weights cast without gradient stayed in the cache for what learns.
            with self.autocast(cache=False):
                batch = attacked(self._encoder(), batch, self.config.adversary, self.parts)
        if self.parts == 1:
            return self._encode(batch)
        self._cache = EmbeddingCache(self._encode, batch.split(self.parts))
        return self._cache.embeddings

    def backward(self, loss: Tensor) -> None:
        """Leave the loss's gradient at the weights, which stand still. `clip` is next."""
        loss = loss * (1.0 + (loss.detach() - loss.detach()))  # times 1, or NaN: never a finite gradient of an inf
        if self.scaling:
            loss = loss * self.scaling.value
        if self.parts == 1:
            self._descend(loss)
        else:
            loss.backward()  # as far as the embeddings
            for number in range(self.parts):
                last = number == self.parts - 1
                with nullcontext() if last else self._unsynchronised():
                    with self.autocast():
                        surrogate = self._cache.surrogate(number)
                    self._descend(surrogate)
            del self._cache
        if self.scaling:
            self.scaling.undo([distributed.part(p.grad) for _, p in self._learning() if p.grad is not None])

    def clip(self) -> Tensor:
        """Clip the gradient; then `update` or `skip`. Returns its global norm from before, on the device.

        The norm is the same on every rank, and not finite where the loss or any rank's gradient is not. DeepSpeed has
        then updated already, or has skipped if the norm is not finite.
        """
        most = self.config.optim.grad_clip or float("inf")
        return nn.utils.clip_grad_norm_([parameter for _, parameter in self._learning()], most)

    def excuses(self, loss: Tensor) -> bool:
        """Whether a gradient that is not finite would be the loss scale's doing, which then halves: not the run's."""
        return self.scaling is not None and self.scaling.value > 1 and bool(torch.isfinite(loss))

    def update(self) -> None:
        """Take the step that `backward` and `clip` prepared."""
        if self.scaling:
            self.scaling.fits()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Drop the gradient, and what the batch did to running statistics."""
        for buffer, before in self._statistics:
            buffer.copy_(before)
        if self.scaling:
            self.scaling.overflowed()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and moments."""
        return {"scaling": asdict(self.scaling)} if self.scaling else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave, also in another precision."""
        if self.scaling and "scaling" in state:
            self.scaling = LossScale(**state["scaling"])

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, each in full, not copied. All ranks ask together."""
        return self.bare.state_dict()

    def load_weights(self, checkpoint: Path) -> None:
        """Put a checkpoint's weights in place. Raises UserError when it is of another architecture."""
        weights_into(self.bare, checkpoint)

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's moments by MOMENT.PARAMETER, each in full, not copied. All ranks ask together."""
        out: dict[str, Tensor] = {}
        for name, parameter in self._learning():
            for key in self._kept:
                value = self._moment(parameter, key)
                if value is not None:
                    out[f"{key}.{name}"] = value.detach().float()
        return out

    def weight_pieces(self) -> dict[str, Piece]:
        """Of the model's tensors what this rank holds, or an equal share of what all hold, not copied."""
        return {name: share(x.detach()) for name, x in self.bare.state_dict().items()}

    def moment_pieces(self) -> dict[str, Piece]:
        """The same of the optimizer's moments, by MOMENT.PARAMETER. Neither exchanges a word."""
        found = [(f"{key}.{name}", self._moment_piece(p, key)) for name, p in self._learning() for key in self._kept]
        return {name: piece for name, piece in found if piece}

    def load_moments(self, moments: Mapping[str, Tensor], updates: int) -> None:
        """Put back what `moments` gave after so many updates."""
        for name, parameter in self._learning():
            if f"exp_avg.{name}" in moments:
                state = {key: self._placed(parameter, moments[f"{key}.{name}"]) for key in self._kept}
                self.optimizer.state[parameter] = state | self._count(updates, parameter.device)

    def student(self) -> AbstractContextManager[Any]:
        """In this context `bare` holds its weights as a hosted teacher follows them."""
        return nullcontext()

    def whole_model(self) -> DualEncoder:
        """The model with all its weights here, to evaluate with. All ranks ask together."""
        return self.bare

    def close(self) -> None:
        """Leave the process group in good order, so that no rank aborts at exit."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    # what other engines do otherwise

    def _join(self) -> torch.device:
        """Meet the other ranks; returns this one's device."""
        start_process_group(self.world, self.config.engine.timeout_s, needed=False)
        self.accelerator = accelerator_for(self.world)
        return self.accelerator.device

    def _wrap(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        return (self.bare, optimizer) if self.world == 1 else self.accelerator.prepare(self.bare, optimizer)

    def _encoder(self) -> Any:
        """What encodes single pictures and texts, outside of a step."""
        return self.bare

    def _encode(self, batch: Batch) -> Embeddings:
        return self.model(batch)

    def _descend(self, loss: Tensor) -> None:
        """Backward of the loss, or of one part's share of it."""
        loss.backward()

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        """Around each part but the last: gradients need not be summed over ranks yet."""
        return self.model.no_sync() if self.world > 1 else nullcontext()  # type: ignore[operator]

    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.bare.named_parameters() if p.requires_grad]

    @property
    def _kept(self) -> tuple[str, ...]:
        """What the run's optimizer remembers of every parameter."""
        return MOMENTS[self.config.optim.kind]

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        return self.optimizer.state.get(parameter, {}).get(key)

    def _moment_piece(self, parameter: nn.Parameter, key: str) -> Piece | None:
        value = self.optimizer.state.get(parameter, {}).get(key)
        return None if value is None else share(value.detach().float())

    def _placed(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """A full moment as this rank keeps it."""
        return value.to(parameter.device)

    def _count(self, updates: int, device: torch.device) -> dict[str, Tensor]:
        """AdamW's own count of steps, which corrects its moments; Lion has none."""
        return {"step": torch.tensor(float(updates), device=device)} if self.config.optim.kind == "adamw" else {}


def engine_for(config: Config) -> Engine:
    """The engine that the config asks for; it has met the other ranks."""
    if config.engine.kind == "deepspeed":
        from clipkit.training.zero import zero_engine_for

        return zero_engine_for(config)
    if config.engine.kind == "fsdp":
        from clipkit.training.fsdp import ShardingEngine

        return ShardingEngine(config)
    return Engine(config)


def start_process_group(world: int, timeout_s: int, needed: bool) -> None:
    """Meet the other ranks of torchrun's variables, where there are any or a group is `needed` all the same."""
    if dist.is_initialized() or (world == 1 and not needed):
        return
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if world == 1 else "29500")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def accelerator_for(world: int, plugin: Any = None) -> Any:
    """accelerate's own, for DDP or a DeepSpeed plugin."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train several times (tests, the demo)
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(
        cpu=on_cpu and plugin is None,
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl")] if world > 1 or plugin else [],
    )
    assert accelerator.num_processes == world, f"{accelerator.num_processes} processes joined, {world} were launched"
    return accelerator


def _compile_towers(model: DualEncoder, device: torch.device) -> None:
    """Have both towers compiled at their first call; weights keep their names, a teacher stays as it was copied."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise UserError("engine.compile: needs a C++ compiler on CPUs, found none; install g++ or set CXX")
    model.image_tower.compile()
    model.text_tower.compile()


def _synchronise_norms(model: nn.Module, world: int, device: torch.device) -> nn.Module:
    """Batch norms that learn must see the global batch, or the loss would depend on the number of ranks."""
    learning = _learning_norms(model)
    if world == 1 or not learning:
        return model
    if device.type == "cpu":
        raise UserError(
            f"model: {len(learning)} batch norms in a learning tower cannot be synchronised on CPU; "
            "use one process, lock the tower, or a tower with group or layer norm"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _learning_norms(model: nn.Module) -> list[nn.Module]:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if any(p.requires_grad for p in norm.parameters())]
