"""Saving a dual encoder so that it knows everything about itself, and getting one from any reference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from clipkit.data.decode import Preprocess
from clipkit.errors import UserError
from clipkit.model.convert import from_transformers
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.names import SCHEMES, Parts, from_open_clip, tokenizer_of
from clipkit.model.pieces import load_table, needed_table
from clipkit.model.spec import MODEL, WEIGHTS, checkpoint_at, find_checkpoint, read_model_json
from clipkit.model.tables import write_table
from clipkit.model.towers import build_towers
from clipkit.model.weights import OPTIONAL, weights_into

__all__ = ["build", "load", "load_checkpoint", "load_teacher", "save", "weights_into"]

TEACHER, STATE = "teacher", "state.json"
"""What a run's checkpoint holds beside the model: a table of its teacher's weights; the config, among other things."""


def save(model: DualEncoder, folder: str | Path, **extra: Any) -> None:
    """Write model.safetensors and model.json (with the JSON-able `extra` beside), each whole or not at all."""
    # Copies: towers may share storage, which safetensors refuses.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_parts(state, description(model, **extra), folder)


def description(model: DualEncoder, **extra: Any) -> dict[str, Any]:
    """What model.json says: all of a model but its weights."""
    return {
        "activation": model.activation,
        "spec": model.spec,
        "scale_max": model.scale_max,
        "bias": model.bias is not None,
        "tokenizer": {
            "name": model.tokenizer.name,
            "context_length": model.tokenizer.context_length,
            "trim": model.tokenizer.trim,
        },
        "preprocess": model.preprocess.to_dict(),
        **extra,
    }


def save_parts(state: dict[str, Tensor], about: dict[str, Any], folder: str | Path) -> None:
    """As `save`, of weights on the CPU that share no storage, and a `description`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The activation goes wherever the weights go; alone, because safetensors writes several entries in random order and
    # equal models should be equal files.
    write_table(state, folder / f".{WEIGHTS}.partial", metadata={"activation": about["activation"]})
    os.replace(folder / f".{WEIGHTS}.partial", folder / WEIGHTS)
    save_description(about, folder)


def save_description(about: dict[str, Any], folder: Path) -> None:
    """Write model.json, whole or not at all."""
    (folder / f".{MODEL}.partial").write_text(json.dumps(about, indent=1))
    os.replace(folder / f".{MODEL}.partial", folder / MODEL)


def load(ref: str | Path, device: str | torch.device | None = None) -> DualEncoder:
    """A dual encoder in eval mode, from any reference; `device` defaults to the GPU where there is one.

    `ref`: a run folder (its newest checkpoint), a checkpoint folder, an open_clip `NAME`, `NAME:TAG` or `NAME:FILE`,
    `hf-hub:ORG/NAME`, a folder in open_clip's hub layout, or a transformers CLIP folder.
    Raises UserError when the reference is none of these or its parts do not belong together.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return _load(str(ref)).to(device).eval()


def _load(ref: str) -> DualEncoder:
    path = Path(ref)
    if ref.startswith(SCHEMES):
        return DualEncoder(from_open_clip(ref))
    if checkpoint := find_checkpoint(path):
        return load_checkpoint(checkpoint)
    if (path / "open_clip_config.json").is_file():
        return DualEncoder(from_open_clip(f"local-dir:{path}"))
    if (path / "config.json").is_file():
        return DualEncoder(from_transformers(path))
    if path.is_dir():
        raise UserError(
            f"{path}: holds no model: neither a checkpoint ({MODEL}), a run (checkpoints/step_*), a transformers CLIP "
            f"(config.json) nor an open_clip folder (open_clip_config.json)"
        )
    if path.is_file():
        raise UserError(
            f"{path}: weights alone do not name their architecture; write NAME:{path} with an open_clip name"
        )
    name = ref.partition(":")[0]
    if "/" in name and name.replace("/", "-") not in open_clip.list_models():
        raise UserError(f"{ref}: no such file or folder")
    return DualEncoder(from_open_clip(ref))


def alike(model: DualEncoder) -> DualEncoder:
    """A model of the same architecture, its weights as they begin; no random number is drawn."""
    with torch.random.fork_rng(devices=[]):
        towers = build_towers(model.spec)
    bias = None if model.bias is None else 0.0
    parts = Parts(model.spec, towers, model.tokenizer, model.preprocess, bias=bias)
    return DualEncoder(parts, scale_max=model.scale_max)


def load_checkpoint(folder: str | Path) -> DualEncoder:
    """Rebuild the dual encoder of a checkpoint folder. Nothing but the folder is needed, save where its text tower or
    tokenizer is one of Hugging Face's: those come from its cache or the hub.
    """
    folder = Path(folder)
    about = read_model_json(folder)
    tokenizer, preprocess = tokenizer_of(**about["tokenizer"]), Preprocess.from_dict(about["preprocess"])
    parts = Parts(
        about["spec"], build_towers(about["spec"]), tokenizer, preprocess, bias=0.0 if about["bias"] else None
    )
    model = DualEncoder(parts, scale_max=about["scale_max"])
    model.load_state_dict(needed_table(folder, Path(WEIGHTS).stem))
    return model


def load_teacher(ref: str | Path) -> DualEncoder:
    """The moving average in a run's newest checkpoint, or in a checkpoint, as a model, on the CPU in eval mode.

    Raises UserError where the checkpoint has no such teacher, or one without a tower that no term looked at.
    """
    folder = checkpoint_at(ref)
    state, own = folder / STATE, load_table(folder, TEACHER)
    if not own or not state.is_file():
        raise UserError(f"{folder}: holds no teacher with weights of its own (teacher.kind: ema)")
    config = json.loads(state.read_text())["config"]
    if config["teacher"]["kind"] != "ema":
        raise UserError(f"{folder}: its teacher is {config['teacher']['kind']}, no average of the student's weights")
    model = load_checkpoint(folder)
    locked = model.lock(image=config["model"]["lock_image"], text=config["model"]["lock_text"]).locked_towers()
    shared = {id(x) for tower in locked for x in (*tower.parameters(), *tower.buffers())}
    absent = [name for name, x in model.state_dict(keep_vars=True).items() if name not in own and id(x) not in shared]
    if absent := [name for name in absent if not name.startswith(OPTIONAL)]:
        raise UserError(
            f"{folder}: its teacher has no {absent[0].partition('.')[0]}, which no term of its run asked a teacher for"
        )
    model.load_state_dict(own, strict=False)
    return model.lock().eval()
