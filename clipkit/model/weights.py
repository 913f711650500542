"""Weights from disk into a model, and of several models into one, if they fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from clipkit import distributed
from clipkit.errors import UserError
from clipkit.model.pieces import needed_table
from clipkit.model.spec import (
    WEIGHTS,
    adapts_text,
    another_architecture,
    checkpoint_at,
    differing_settings,
    read_model_json,
)

if TYPE_CHECKING:
    from clipkit.model.dual_encoder import DualEncoder

OPTIONAL = ("heads.tags.", "heads.aspects.")
"""Heads that a model does not need to give its embeddings."""


def weights_into(model: DualEncoder, path: str | Path) -> None:
    """Copy a checkpoint's weights into a model of the same architecture, in place, keeping the model's types.

    A learned bias and heads that only the model has keep their values, and so does an adapter on stored features where
    the checkpoint reads tokens; that text tower, and OPTIONAL heads that only the checkpoint has, are left behind.
    Raises UserError naming the first settings or tensors that differ: above all the activation, which no tensor shows.
    """
    folder = checkpoint_at(path)
    there = read_model_json(folder)["spec"]
    problems = differing_settings(there, model.spec)
    new = ("text_tower.",) if adapts_text(there, model.spec) else ()
    own, stored = model.state_dict(), needed_table(folder, Path(WEIGHTS).stem)
    kept = [name for name in own if name == "bias" or name.startswith(("heads.", *new))]
    taken = [name for name in stored if not name.startswith(new) and (name in own or not name.startswith(OPTIONAL))]
    # Where each is read, one at a time: a checkpoint in pieces need not fit into memory whole.
    source: dict[str, Mapping[str, Tensor]] = dict.fromkeys(kept, own) | dict.fromkeys(taken, stored)
    for name in sorted(own.keys() | source.keys()):
        there = list(source[name][name].shape) if name in source else "missing"
        here = list(own[name].shape) if name in own else "missing"
        if there != here:
            problems.append(f"tensor {name}: {there} there, {here} here")
    if problems:
        raise another_architecture(folder, problems)
    for name, tensor in own.items():
        distributed.fill(tensor, source[name][name])


def mean_of_weights(parts: Iterable[tuple[str, float, DualEncoder]]) -> DualEncoder:
    """The model whose weights are the sum of share × weights over (name, share, model); shares should add up to 1.

    Models may come one by one, of each only its weights are kept. Averaged in float64, so that equal models give
    themselves; what counts (whole numbers) is the first one's. WiSE-FT (arXiv 2109.01903), soups (arXiv 2203.05482).
    Raises UserError for models of different architectures, naming two of them and what differs first.
    """
    first, base, total = "", None, {}
    for name, share, model in parts:
        state = model.state_dict()
        if base is None:
            first, base = name, model
            total = {key: share * x.double() if x.is_floating_point() else x.clone() for key, x in state.items()}
            continue
        if problems := _differences(model, base):
            raise UserError(
                f"{name} and {first}: cannot be merged, they are of different architectures:\n  "
                + "\n  ".join(problems[:3])
            )
        for key, x in state.items():
            if x.is_floating_point():
                total[key] += share * x.double()
    assert base is not None, "a mean of nothing"
    base.load_state_dict(total)
    return base


def _differences(model: DualEncoder, base: DualEncoder) -> list[str]:
    """What keeps the weights of one from meaning the same in the other, a line each."""
    problems = differing_settings(model.spec, base.spec)
    for what in ("tokenizer.name", "tokenizer.context_length", "preprocess"):
        there, here = (attrgetter(what)(one) for one in (model, base))
        if there != here:
            problems.append(f"{what}: {there} there, {here} here")
    shapes = [{key: list(x.shape) for key, x in one.state_dict().items()} for one in (model, base)]
    for key in sorted(shapes[0].keys() | shapes[1].keys()):
        there, here = (table.get(key, "missing") for table in shapes)
        if there != here:
            problems.append(f"tensor {key}: {there} there, {here} here")
    return problems
