"""DeepSpeed's ZeRO: moments, gradients and weights divided among ranks, through accelerate.

Traps that this file exists for (docs/log.md has the measurements): DeepSpeed clips at 1.0 unless told otherwise,
compiles an unused shared-memory op on CPU and looks for MPI when no process group is up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.training.engine import Engine, accelerator_for, start_process_group


class ZeroEngine(Engine):
    """DeepSpeed, stages 1 and 2."""

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

    def update(self) -> None:
        """DeepSpeed has taken the step in `backward`."""
        self.optimizer.zero_grad(set_to_none=True)

    def load_moments(self, moments: dict[str, Tensor], updates: int) -> None:
        """Write full moments and fp32 masters into this rank's part of ZeRO's flat groups."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        zero = self.optimizer.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            state = {key: torch.zeros_like(flat) for key in self._kept}
            zero.optimizer.state[flat] = self._count(updates, flat.device) | state
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

    def _descend(self, loss: Tensor) -> None:
        if self.parts == 1:
            self.accelerator.backward(loss)
        else:  # it divides by the number of parts, and steps at the last of them
            self.model.backward(loss * self.parts)  # type: ignore[operator]
            self.model.step()  # type: ignore[operator]

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        return nullcontext()  # it knows by itself

    def _clipped(self, most: float) -> Tensor:
        return torch.as_tensor(self.model.get_global_grad_norm(), device=self.device)  # type: ignore[operator]

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)

    def _link_shards(self) -> None:
        """Tell every parameter where its moments lie. DeepSpeed does so once, when only the first group has stepped."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.optimizer.optimizer  # accelerate's wrapper → DeepSpeed's → torch's own
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


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
