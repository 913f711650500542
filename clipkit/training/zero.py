"""DeepSpeed's ZeRO: moments, gradients and weights divided among ranks, through accelerate.

Traps that this file exists for (docs/log.md has the measurements): DeepSpeed clips at 1.0 unless told otherwise,
compiles an unused shared-memory op on CPU and looks for MPI when no process group is up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit import distributed
from clipkit.config import Config
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.load import alike
from clipkit.model.pieces import Piece, share
from clipkit.training.engine import Engine, accelerator_for, start_process_group

RESIDENT = 100_000
"""Parameters of at most so many numbers stay whole under ZeRO-3: to gather them costs more than to keep them."""


def zero_engine_for(config: Config) -> Engine:
    """The engine of the config's stage."""
    return (Zero0Engine, Zero12Engine, Zero12Engine, Zero3Engine)[config.engine.zero_stage](config)


class Zero0Engine(Engine):
    """DeepSpeed that divides nothing: DDP with its reductions. The other stages stand on it."""

    def update(self) -> None:
        """Take the step that `backward` and `clip` prepared."""
        self.model.step()  # type: ignore[operator]

    def skip(self) -> None:
        """Drop the gradient, and what the batch did to running statistics."""
        super().skip()
        self.bare.zero_grad(set_to_none=True)  # accelerate's optimizer leaves that to DeepSpeed
        self.model.step()  # type: ignore[operator]  # counts a step, and moves nothing without gradients

    def close(self) -> None:
        """Leave the process group; one alone keeps it: DeepSpeed remembers it for what trains next in the process."""
        if self.world > 1:
            super().close()

    def _join(self) -> torch.device:
        if not torch.cuda.is_available():
            # This op is only for inference, and compiling it costs half a minute or fails without a compiler.
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
        start_process_group(self.world, self.config.engine.timeout_s, needed=True)
        from accelerate import DeepSpeedPlugin

        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(self.config, self.world))
        self.accelerator = accelerator_for(self.world, plugin)
        return self.accelerator.device

    def _wrap(self, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        return self.accelerator.prepare(self.bare, optimizer)

    def _descend(self, loss: Tensor) -> None:
        self.model.backward(loss * self.parts)  # type: ignore[operator]  # it divides by their number

    @contextmanager
    def _unsynchronised(self) -> Iterator[None]:
        yield
        self.model.step()  # type: ignore[operator]  # steps only at the last part


class _DividingEngine(Zero0Engine):
    """Stages that have their own step: it clips, and skips where the gradient is not finite."""

    def clip(self) -> Tensor:
        """Take the step as well, or skip it; returns the gradient's global norm from before clipping."""
        self.model.step()  # type: ignore[operator]
        return torch.as_tensor(self.model.get_global_grad_norm(), device=self.device)  # type: ignore[operator]

    def update(self) -> None:
        """The step was taken in `clip`."""
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """Drop what the batch did to running statistics."""
        Engine.skip(self)

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        value = safe_get_full_optimizer_state(parameter, key)
        return None if value is None else value.cpu()

    def _begin_moments(self, flats: list[Tensor], updates: int) -> None:
        """Moments of 0 for this rank's flat groups of weights."""
        zero = self.optimizer.optimizer  # accelerate's wrapper → DeepSpeed's → torch's own
        for flat in flats:
            state = {key: torch.zeros_like(flat) for key in self._kept}
            zero.optimizer.state[flat] = self._count(updates, flat.device) | state


class Zero12Engine(_DividingEngine):
    """Moments (stage 1), and gradients as well (stage 2), divided among ranks."""

    def load_moments(self, moments: Mapping[str, Tensor], updates: int) -> None:
        """Write full moments and fp32 masters into this rank's part of ZeRO's flat groups."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._begin_moments(self.optimizer.optimizer.single_partition_of_fp32_groups, updates)
        self._link_shards()
        for name, parameter in self._learning():
            safe_set_full_fp32_param(parameter, parameter.detach().float())
            for key in self._kept:
                if f"{key}.{name}" in moments:
                    safe_set_full_optimizer_state(parameter, moments[f"{key}.{name}"].to(parameter.device), key)

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's moments by MOMENT.PARAMETER, each in full, on the CPU. All ranks ask together."""
        self._link_shards()
        return super().moments()

    def moment_pieces(self) -> dict[str, Piece]:
        """Of the optimizer's moments what this rank holds, by MOMENT.PARAMETER. No word is exchanged."""
        self._link_shards()
        return super().moment_pieces()

    def _moment_piece(self, parameter: Any, key: str) -> Piece | None:
        held = parameter._hp_mapping
        if held is None:
            return None
        return Piece(held.get_hp_fragment(key), held.lp_fragment_address.start, tuple(parameter.shape))

    def _link_shards(self) -> None:
        """Tell every parameter where its moments lie. DeepSpeed does so once, when only the first group has stepped."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.optimizer.optimizer
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


class Zero3Engine(_DividingEngine):
    """Weights divided as well, each gathered while its module works. The teacher stays whole on every rank."""

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, each in full, on the CPU. All ranks ask together."""
        with self.student():
            return {name: x.detach().to("cpu", copy=True) for name, x in self.bare.state_dict().items()}

    def weight_pieces(self) -> dict[str, Piece]:
        """Of the model's tensors what this rank holds, not copied. No word is exchanged."""
        buffers = {
            name: share(x) for name, x in self.bare.state_dict().items() if name in dict(self.bare.named_buffers())
        }
        return buffers | {name: _held(p, p.ds_tensor) for name, p in self.bare.named_parameters()}

    def _moment_piece(self, parameter: nn.Parameter, key: str) -> Piece | None:
        from deepspeed.utils import safe_get_local_optimizer_state

        return _held(parameter, safe_get_local_optimizer_state(parameter, key))

    def load_weights(self, checkpoint: Path) -> None:
        """Put a checkpoint's weights in place. Raises UserError when it is of another architecture."""
        with self._gathered(modifier_rank=0):
            super().load_weights(checkpoint)

    def load_moments(self, moments: Mapping[str, Tensor], updates: int) -> None:
        """Write full moments and fp32 masters into this rank's part of ZeRO's flat groups."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self._begin_moments(self.optimizer.optimizer.fp32_partitioned_groups_flat, updates)
        for name, parameter in self._learning():
            safe_set_local_fp32_param(parameter, parameter.ds_tensor.detach().float())  # type: ignore[attr-defined]
            for key in self._kept:
                if f"{key}.{name}" in moments:
                    value = moments[f"{key}.{name}"].to(self.device)
                    safe_set_local_optimizer_state(parameter, _own_part(value, parameter), key)

    def student(self) -> AbstractContextManager[Any]:
        """In this context `bare` holds its weights in full."""
        return self._gathered()

    def whole_model(self) -> DualEncoder:
        """A copy with all weights. All ranks ask together."""
        model = alike(self.bare)
        model.load_state_dict(self.weights())
        return model.to(self.device)

    def _gathered(self, modifier_rank: int | None = None) -> AbstractContextManager[Any]:
        from deepspeed import zero

        return zero.GatheredParameters(list(self.bare.parameters()), modifier_rank=modifier_rank)


def _own_part(value: Tensor, parameter: Any) -> Tensor:
    """What this rank holds of a full tensor that is divided like `parameter`: equal parts, the last padded with 0."""
    size = parameter.ds_tensor.numel()
    padded = F.pad(value.flatten(), (0, size * distributed.world_size() - value.numel()))
    return padded[distributed.rank() * size :][:size]


def _held(parameter: Any, values: Tensor) -> Piece:
    """This rank's `values` of something divided like `parameter`, without what pads them."""
    start = parameter.ds_tensor.numel() * distributed.rank()
    most = max(0, parameter.ds_numel - start)
    return Piece(values.detach().flatten()[:most], start, tuple(parameter.ds_shape))


def deepspeed_config(config: Config, world: int) -> dict[str, Any]:
    """The DeepSpeed settings of a run; every default that surprises is written out."""
    zero: dict[str, Any] = {"stage": config.engine.zero_stage, "stage3_param_persistence_threshold": RESIDENT}
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.engine.offload != "none":
        zero["offload_optimizer"] = host
    if config.engine.offload == "all":
        zero["offload_param"] = host
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world // config.engine.accumulate,
        "gradient_accumulation_steps": config.engine.accumulate,
        # Absent means 1.0, not off. Stage 0 does not tell the norm: it is clipped here.
        "gradient_clipping": config.optim.grad_clip if config.engine.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW for the host wants a compiler, and knows no Lion
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.engine.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
