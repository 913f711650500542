"""Whole checkpoints, in one form for every engine and world size.

    checkpoints/step_00000200/
      model.json  model.safetensors      the student, loadable by `clipkit.load` alone
      teacher.safetensors                when there is one
      terms.safetensors                  when there is one that remembers something
      optimizer.safetensors              moments by parameter name, in full, whatever the engine shards
      state.json                         step, position in the data, resolved config
      rng_0.safetensors …                one per rank

Everything is written into a hidden folder first and renamed when complete, so a killed save leaves no half
checkpoint. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipkit import distributed
from clipkit.config import Config
from clipkit.data.mixture import Mixture
from clipkit.data.plan import Plan
from clipkit.errors import UserError
from clipkit.model.load import save as save_model
from clipkit.model.teacher import Teacher
from clipkit.model.weights import weights_into
from clipkit.objective import Objective
from clipkit.training.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    folder: Path,
    step: int,
    engine: Engine,
    teacher: Teacher | None,
    objective: Objective,
    config: Config,
    position: dict,
) -> Path:
    """Write the checkpoint of `step` into the run folder. All ranks call this together."""
    final = folder / "checkpoints" / f"step_{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    moments = _moments(engine)  # every rank takes part in gathering what ZeRO shards
    save_file({"torch": torch.get_rng_state()}, partial / f"rng_{distributed.rank()}.safetensors")
    if distributed.is_main():
        save_model(engine.bare, partial)
        save_file(moments, partial / "optimizer.safetensors")
        if teacher:
            save_file(teacher.state(), partial / "teacher.safetensors")
        if remembered := objective.state():
            save_file(remembered, partial / "terms.safetensors")
        state = {"step": step, "position": position, "config": config.model_dump(mode="json")}
        (partial / "state.json").write_text(json.dumps(state, indent=1))
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in whole_checkpoints(folder)[: -config.keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("step_*"))


def restore(folder: Path, engine: Engine, teacher: Teacher | None, objective: Objective, plan: Plan | Mixture) -> int:
    """Bring everything back to the newest checkpoint of the run; returns its step, 0 when there is none."""
    whole = whole_checkpoints(folder)
    if not whole:
        return 0
    last = whole[-1]
    state = json.loads((last / "state.json").read_text())
    try:
        step = plan.step_of(state["position"])
    except UserError as error:
        raise UserError(
            f"{last}: {error}; restore the shards, or start a new run that begins from this checkpoint with model.start"
        ) from None
    weights_into(engine.bare, last)
    if teacher:
        teacher.load_state(load_file(last / "teacher.safetensors"))
    if (last / "terms.safetensors").is_file():
        objective.load_state(load_file(last / "terms.safetensors"))
    _restore_moments(engine, load_file(last / "optimizer.safetensors"), step)
    rng = last / f"rng_{distributed.rank()}.safetensors"
    if rng.is_file():  # absent on ranks that the saving world did not have
        torch.set_rng_state(load_file(rng)["torch"])
    return step


def _moments(engine: Engine) -> dict[str, Tensor]:
    """The optimizer's moments by parameter name, each in full. All ranks call this together."""
    if engine.deepspeed:
        _link_shards(engine)
    out: dict[str, Tensor] = {}
    for name, parameter in engine.bare.named_parameters():
        if not parameter.requires_grad:
            continue
        for key in MOMENTS:
            value = _full_moment(engine, parameter, key)
            if value is not None:
                out[f"{key}.{name}"] = value.detach().float().cpu().contiguous()
    return out


def _full_moment(engine: Engine, parameter: torch.nn.Parameter, key: str) -> Tensor | None:
    if engine.deepspeed:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)
    return engine.optimizer.state.get(parameter, {}).get(key)


def _restore_moments(engine: Engine, moments: dict[str, Tensor], step: int) -> None:
    if engine.deepspeed:
        _restore_shards(engine, moments, step)
        return
    for name, parameter in engine.bare.named_parameters():
        if f"exp_avg.{name}" in moments:
            engine.optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{key: moments[f"{key}.{name}"].to(parameter.device) for key in MOMENTS},
            }


def _restore_shards(engine: Engine, moments: dict[str, Tensor], step: int) -> None:
    """Write full moments and fp32 masters into this rank's part of ZeRO's flat groups."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    zero = engine.optimizer.optimizer
    for flat in zero.single_partition_of_fp32_groups:
        state = {key: torch.zeros_like(flat) for key in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **state}
    _link_shards(engine)
    for name, parameter in engine.bare.named_parameters():
        if not parameter.requires_grad:
            continue
        safe_set_full_fp32_param(parameter, parameter.detach().float())
        for key in MOMENTS:
            if f"{key}.{name}" in moments:
                safe_set_full_optimizer_state(parameter, moments[f"{key}.{name}"].to(parameter.device), key)


def _link_shards(engine: Engine) -> None:
    """Tell every parameter where its moments lie. DeepSpeed does so once, when only the first group has stepped."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero = engine.optimizer.optimizer  # accelerate's wrapper → DeepSpeed's → torch's AdamW
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
