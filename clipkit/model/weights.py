"""Weights from disk into a model, if they fit it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from clipkit import distributed
from clipkit.model.spec import WEIGHTS, another_architecture, checkpoint_at, differing_settings, read_model_json

if TYPE_CHECKING:
    from clipkit.model.dual_encoder import DualEncoder

OPTIONAL = ("heads.tags.", "heads.aspects.")
"""Heads that a model does not need to give its embeddings."""


def weights_into(model: DualEncoder, path: str | Path) -> None:
    """Copy a checkpoint's weights into a model of the same architecture, in place, keeping the model's types.

    A learned bias and heads that only the model has keep their values; OPTIONAL heads that only the checkpoint has are
    left behind. Raises UserError naming the first settings or tensors that differ: above all the activation, which no
    tensor shows.
    """
    folder = checkpoint_at(path)
    problems = differing_settings(read_model_json(folder)["spec"], model.spec)
    state = load_file(folder / WEIGHTS)
    own = model.state_dict()
    kept = {name: value for name, value in own.items() if name == "bias" or name.startswith("heads.")}
    state = kept | {name: value for name, value in state.items() if name in own or not name.startswith(OPTIONAL)}
    for name in sorted(own.keys() | state.keys()):
        there, here = (list(table[name].shape) if name in table else "missing" for table in (state, own))
        if there != here:
            problems.append(f"tensor {name}: {there} there, {here} here")
    if problems:
        raise another_architecture(folder, problems)
    for name, tensor in own.items():
        distributed.fill(tensor, state[name])
