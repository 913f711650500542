"""One engine from one loop: a single process, DDP, or DeepSpeed ZeRO-1/2, through accelerate.

The traps this file exists for (docs/log.md has the measurements): accelerate on CPU under torchrun silently runs
unconnected trainings; DeepSpeed clips at 1.0 unless told otherwise, compiles an unused shared-memory op on CPU and
looks for MPI when no process group is up; gloo must be asked for by name.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.checks import check_split
from clipkit.config import Config
from clipkit.data.batch import Batch
from clipkit.errors import UserError
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.embeddings import Embeddings
from clipkit.training.accumulate import EmbeddingCache
from clipkit.training.adversary import attacked


class Engine:
    """Holds the wrapped model and optimizer; knows how to run one step on this topology."""

    def __init__(self, config: Config):
        self.config = config
        self.deepspeed = config.engine.kind == "deepspeed"
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.parts = config.engine.accumulate
        check_split(config, self.world)
        _start_process_group(self.world, config.engine.timeout_s, needed=self.deepspeed)
        self.accelerator = _accelerator(config, self.world)
        self.device: torch.device = self.accelerator.device
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
        self.bare: Any = _synchronise_norms(model, self.world, self.device).to(self.device)
        self._running = [buffer for norm in _learning_norms(self.bare) for buffer in norm.buffers()]
        if self.world == 1 and not self.deepspeed:
            self.model, self.optimizer = self.bare, optimizer
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.bare, optimizer)

    def autocast(self, *, cache: bool = True) -> torch.autocast:
        """bf16 compute on fp32 parameters when asked for."""
        enabled = self.config.engine.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=cache)

    def embed(self, batch: Batch) -> Embeddings:
        """This rank's embeddings; with `engine.accumulate` only values, whose gradient `backward` takes further.

        With `adversary.eps` of pictures moved against the model; the batch stays as it is.
        """
        self._statistics = [(buffer, buffer.clone()) for buffer in self._running]
        if self.config.adversary.eps:
            # Before pytorch #158232 was mended, weights cast without gradient stayed in the cache for what learns.
            with self.autocast(cache=False):
                batch = attacked(self.bare, batch, self.config.adversary, self.parts)
        if self.parts == 1:
            return self.model(batch)
        self._cache = EmbeddingCache(self.model, batch.split(self.parts))
        return self._cache.embeddings

    def backward(self, loss: Tensor) -> Tensor:
        """Backward and clip; then `update` or `skip`. Returns the global gradient norm before clipping, on the device.

        The norm is the same on every rank, and not finite where the loss or any rank's gradient is not. DeepSpeed has
        then updated already, or has skipped if the norm is not finite.
        """
        clip = self.config.optim.grad_clip or float("inf")
        loss = loss * (1.0 + (loss.detach() - loss.detach()))  # times 1, or NaN: never a finite gradient of an inf
        if self.parts == 1:
            self.accelerator.backward(loss)
        else:
            self._backward_in_parts(loss)
        if self.deepspeed:
            return torch.as_tensor(self.model.get_global_grad_norm(), device=self.device)  # type: ignore[operator]
        return nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], clip)

    def update(self) -> None:
        """Take the step that `backward` prepared."""
        if not self.deepspeed:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Drop the gradient, and what the batch did to running statistics."""
        for buffer, before in self._statistics:
            buffer.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)

    def _backward_in_parts(self, loss: Tensor) -> None:
        loss.backward()  # as far as the embeddings
        for number in range(self.parts):
            last = number == self.parts - 1
            ddp = isinstance(self.model, nn.parallel.DistributedDataParallel)
            with self.model.no_sync() if ddp and not last else nullcontext():  # type: ignore[operator]
                with self.autocast():
                    surrogate = self._cache.surrogate(number)
                if self.deepspeed:  # it divides by the number of parts, and steps at the last of them
                    self.model.backward(surrogate * self.parts)  # type: ignore[operator]
                    self.model.step()  # type: ignore[operator]
                else:
                    surrogate.backward()
        del self._cache

    def close(self) -> None:
        """Leave the process group in good order, so that no rank aborts at exit."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _start_process_group(world: int, timeout_s: int, needed: bool) -> None:
    if needed and not torch.cuda.is_available():
        # This op is only for inference, and compiling it costs half a minute or fails without a compiler.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
    if dist.is_initialized() or (world == 1 and not needed):
        return
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if world == 1 else "29500")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def _accelerator(config: Config, world: int) -> Any:
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train several times (tests, the demo)
    on_cpu = not torch.cuda.is_available()
    plugin = None
    if config.engine.kind == "deepspeed":
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, world))
    accelerator = Accelerator(
        cpu=on_cpu and plugin is None,
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl")] if world > 1 or plugin else [],
    )
    assert accelerator.num_processes == world, f"{accelerator.num_processes} processes joined, {world} were launched"
    return accelerator


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """The DeepSpeed settings of a run; every default that surprises is written out."""
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world // config.engine.accumulate,
        "gradient_accumulation_steps": config.engine.accumulate,
        "gradient_clipping": config.optim.grad_clip,  # absent means 1.0, not off
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


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
