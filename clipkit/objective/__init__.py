"""The objective: a weighted sum of small terms over global tables (`Embeddings.world()`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.measures import pulls
from clipkit.registry import TERMS

__all__ = ["TERMS", "Objective", "objective"]


class Objective:
    """Σ weight · term over `terms` (name → settings, `weight` default 1), built once for a run.

    A term is a function of the embeddings; one that remembers something from step to step is a class, made with the
    settings, whose objects take the embeddings and have `state()`, `load_state()` and `undo()`. Raises UserError for a
    term that does not exist.
    """

    def __init__(self, terms: dict[str, dict[str, Any]]):
        self.weights = {name: settings.get("weight", 1.0) for name, settings in terms.items()}
        self.terms = {
            name: build(name, {key: value for key, value in settings.items() if key != "weight"})
            for name, settings in terms.items()
        }
        self.pulls: dict[str, float] = {}
        """Each term's share of the gradient at the embeddings, where the last call was to find it (`at`)."""

    @property
    def needs(self) -> set[str]:
        """What the embeddings have to hold."""
        return {need for name in self.terms for need in TERMS.entry(name).needs}

    def __call__(
        self, z: Embeddings, at: Embeddings | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The sum, and each term unweighted, without gradient. `z` holds the global tables: pass `z.world()`.

        With `at`, this rank's tables, `pulls` are found too, at the price of one more backward pass of each term.
        """
        values = {name: term(z) for name, term in self.terms.items()}
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        self.pulls = pulls({name: self.weights[name] * value for name, value in values.items()}, at) if at else {}
        # DDP waits for the gradient of every parameter: what no term asks for gets 0, and so does all behind it.
        for learned in (z.scale, z.bias, z.tag_logits, z.image, z.text):
            if isinstance(learned, Tensor):
                total = total + 0.0 * learned.sum()
        return total, {name: value.detach() for name, value in values.items()}

    def undo(self) -> None:
        """Let the terms forget the last batch, whose step was skipped."""
        for term in self._stateful().values():
            term.undo()

    def state(self) -> dict[str, Tensor]:
        """What the terms remember, as `TERM.NAME`, whole at the main rank. All ranks call this together."""
        return {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, term in self._stateful().items()
            for key, value in term.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave. Raises UserError when it belongs to terms that are not here."""
        stateful = self._stateful()
        lost = {name.partition(".")[0] for name in state} - stateful.keys()
        if lost:
            raise UserError(f"objective: the checkpoint holds the state of {', '.join(sorted(lost))}, not in use here")
        for name, term in stateful.items():
            own = {key.partition(".")[2]: value for key, value in state.items() if key.partition(".")[0] == name}
            term.load_state(own)

    def _stateful(self) -> dict[str, Any]:
        return {name: term for name, term in self.terms.items() if hasattr(term, "load_state")}


def build(name: str, settings: dict[str, Any]) -> Any:
    """The term called `name` with these settings, to be called with the embeddings."""
    target = TERMS.entry(name).target
    return target(**settings) if inspect.isclass(target) else partial(target, **settings)


def objective(
    z: Embeddings, terms: dict[str, dict[str, Any]]
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """`Objective(terms)` of one batch, for terms that remember nothing from before."""
    return Objective(terms)(z)
