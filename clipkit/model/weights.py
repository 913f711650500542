"""Weights on disk: which checkpoint a path means, and whether its weights fit a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
from safetensors.torch import load_file

from clipkit.errors import UserError
from clipkit.model.towers import Spec

if TYPE_CHECKING:
    from clipkit.model.dual_encoder import DualEncoder

MODEL, WEIGHTS = "model.json", "model.safetensors"
_WITHOUT_WEIGHT = {"dropout", "patch_dropout", "timm_drop", "timm_drop_path", "output_tokens", "timm_model_pretrained"}
_WITHOUT_WEIGHT |= {"hf_model_pretrained", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "drop_path_rate"}
"""Settings that may differ between weights and model."""


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint folder meant by a checkpoint folder, its weights file, or a run folder (the newest); else None."""
    path = Path(path)
    folder = path.parent if path.name == WEIGHTS else path
    if (folder / MODEL).is_file():
        return folder
    steps = [file.parent for file in folder.glob(f"checkpoints/step_*/{MODEL}")]
    return max(steps, key=lambda step: int(step.name.removeprefix("step_")), default=None)


def read_model_json(folder: Path) -> dict[str, Any]:
    """A checkpoint's description of itself. Raises UserError when it is not one of clipkit's."""
    try:
        about = json.loads((folder / MODEL).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / MODEL}: not JSON: {error}") from None
    if "spec" not in about:
        raise UserError(f"{folder / MODEL}: not written by clipkit: it has no spec")
    return about


def weights_into(model: DualEncoder, path: str | Path) -> None:
    """Copy a checkpoint's weights into a model of the same architecture, in place, keeping the model's types.

    A learned bias that only the model has keeps its value. Raises UserError naming the first settings or tensors that
    differ: above all the activation, which no tensor shows.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise UserError(f"{path}: holds no checkpoint: neither {MODEL} nor checkpoints/step_*/{MODEL}")
    problems = _differing_settings(read_model_json(folder)["spec"], model.spec)
    state = load_file(folder / WEIGHTS)
    own = model.state_dict()
    if "bias" in own:
        state.setdefault("bias", own["bias"])
    for name in sorted(own.keys() | state.keys()):
        there, here = (list(table[name].shape) if name in table else "missing" for table in (state, own))
        if there != here:
            problems.append(f"tensor {name}: {there} there, {here} here")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{folder}: is of another architecture than the model:\n  " + "\n  ".join(problems[:3]) + more)
    model.load_state_dict(state)


def _differing_settings(there: Spec, here: Spec) -> list[str]:
    flat_there, flat_here = _flat(_with_defaults(there)), _flat(_with_defaults(here))
    both = flat_there.keys() & flat_here.keys()
    # The plainest difference first: the activation, then what both sides name, the outermost first.
    names = sorted(
        flat_there.keys() | flat_here.keys(),
        key=lambda name: (name != "activation", name not in both, name.count("."), name),
    )
    out = []
    for name in names:
        a, b = (json.dumps(flat.get(name)) for flat in (flat_there, flat_here))
        if a != b and name.rpartition(".")[2] not in _WITHOUT_WEIGHT:
            why = "; under another activation the numbers are quietly wrong" if name == "activation" else ""
            out.append(f"{name}: {a} there, {b} here{why}")
    return out


def _with_defaults(spec: Spec) -> Spec:
    image = spec["image"]
    if image["kind"] == "open_clip":
        image = {**image, "cfg": dataclasses.asdict(open_clip.CLIPVisionCfg()) | image["cfg"]}
    return {**spec, "image": image, "text": dataclasses.asdict(open_clip.CLIPTextCfg()) | spec["text"]}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out
