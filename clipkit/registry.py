"""The one mechanism: a registered function whose keyword-only arguments are its settings.

    @term(needs="negative_text")
    def igc(z: Embeddings, *, reference: float = 1.0) -> Tensor: ...

The config schema of an entry is derived from its signature, so a new method adds no config class.
A registry knows the *names* of the modules that fill it and imports them on first use, so that nothing
heavy is imported before it is needed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from clipkit.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """A registered function or class and what it asks of its surroundings."""

    name: str
    target: Callable[..., Any]
    needs: tuple[str, ...] = ()
    settings: dict[str, inspect.Parameter] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.target) or "").partition("\n")[0]


class Registry(Mapping[str, Callable[..., Any]]):
    """Name -> function or class, filled by decorators, imported on first use."""

    def __init__(self, kind: str, modules: tuple[str, ...]):
        self.kind, self._modules = kind, modules
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(self, *, name: str | None = None, needs: str | tuple[str, ...] = ()) -> Callable[[Any], Any]:
        """Decorator: file the function under its own name (or `name`); `needs` names what its input must hold.

        Of the teacher: `teacher.ROLE`, or `teacher.ROLE?` where it can do without, and `teacher_width` where the
        teacher's embeddings have to be as wide as the student's (clipkit/checks.py).
        """

        def decorate(target: Any) -> Any:
            key = name or target.__name__
            if key in self._entries:
                raise AssertionError(f"{self.kind} {key} is registered twice")
            self._entries[key] = Entry(key, target, (needs,) if isinstance(needs, str) else needs, settings_of(target))
            return target

        return decorate

    def entry(self, name: str) -> Entry:
        """The entry called `name`. Raises UserError with the nearest valid name."""
        self._load()
        if name not in self._entries:
            raise UserError(f"no {self.kind} called {name}{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __getitem__(self, name: str) -> Callable[..., Any]:
        self._load()
        return self._entries[name].target

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for module in self._modules:
                importlib.import_module(module)


def settings_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function (of `__init__` for a class), with evaluated annotations."""
    signature = inspect.signature(target, eval_str=True)
    return {p.name: p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


_OBJECTIVE = (
    "contrast", "grounding", "distill", "sigmoid", "weighted", "groups", "ranking", "synthetic", "views", "uniformity",
    "moving",
    "queued",
    "labels",
    "aspects",
)  # fmt: skip
TERMS = Registry("term", tuple(f"clipkit.objective.{m}" for m in _OBJECTIVE))
RULES = Registry("rule", tuple(f"clipkit.negatives.{m}" for m in ("rules", "clauses", "additions", "wordnet")))
SOURCES = Registry("source", ("clipkit.data.sources", "clipkit.data.abstract_scenes"))
SCORES = Registry("score", ("clipkit.evaluation.scores",))

term, rule, source, score = TERMS.register, RULES.register, SOURCES.register, SCORES.register
