"""What clipkit trains by: every method (a packaged config) and every term, described from configs and docstrings.

`docs/methods.md` is `markdown(...)`, written by `clipkit methods --markdown`; a test compares the two.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit import config as configuration
from clipkit.config import Config, data_folders
from clipkit.registry import TERMS, Entry

GROUND = ("base/pretrain.yaml", "base/finetune_coco.yaml")
"""Methods are the configs that stand on one of these, perhaps through another; the others are runs on given data."""

NEEDS = {
    "negative_text": "negative captions",
    "negative_image": "pictures of negatives",
    "positives": "several captions a picture",
    "teacher": "a teacher",
    "frozen teacher": "a guide (frozen teacher)",
    "locked image": "a locked image tower",
    "bias": "a learned bias",
    "relevance": "`relevance` in the shards",
}
"""What a method may need, in the words of the table."""

Side = tuple[str, dict[str, Any]]
RELATIONS: tuple[tuple[Side, Side, str], ...] = (
    (("hn_nce", {"alpha": 1.0, "beta": 0.0}), ("infonce", {"negatives": "none"}), ""),
    (("hn_nce", {"alpha": 0.0, "beta": 0.0}), ("dcl", {}), ""),
    (("fsc_global", {"gamma": 0.0, "smoothing": 0.0}), ("igc", {}), ""),
    (("tcl", {"log_k1": float("-inf")}), ("infonce", {"negatives": "none"}), "where no picture comes up twice"),
    (("one_to_k", {}), ("infonce", {"negatives": "none"}), "where no picture comes up twice"),
    (("siglip", {"positives": "group"}), ("siglip", {"mask_same_group": False}), "where no picture comes up twice"),
    (("infonce", {"negatives": "own"}), ("infonce", {"negatives": "none"}), "without negatives"),
)
"""Terms that coincide: (term, settings) twice, and when. Each is tested."""


@dataclass(frozen=True)
class Method:
    """A packaged config and what its head comment says of it."""

    name: str
    title: str
    """What it is called, and its arXiv id."""
    about: str
    reports: str
    """Published figures, and whose."""
    cost: str
    config: Config

    @property
    def needs(self) -> list[str]:
        """What it asks for beside pairs, in the words of NEEDS."""
        config = self.config
        asked = {need for name in config.objective for need in TERMS.entry(name).needs}
        asked |= {"negative_text"} if config.data.negatives else set()
        asked |= {"negative_image"} if config.data.negative_images else set()
        asked |= {"positives"} if config.data.positives else set()
        asked |= {"relevance"} if "gcl" in config.objective else set()
        asked |= {"locked image"} if config.model.lock_image else set()
        if config.teacher.kind == "frozen":
            asked = asked - {"teacher"} | {"frozen teacher"}
        return [words for key, words in NEEDS.items() if key in asked]


def every() -> list[str]:
    """Names of the packaged methods."""
    folder = next(folder for folder in data_folders("configs") if folder.is_dir())
    return sorted(path.stem for path in folder.glob("*.yaml") if _ground(path) in GROUND)


def _ground(path: Path) -> str:
    base = re.search(r"^base: (\S+)", path.read_text(), re.MULTILINE)
    if not base or base[1].startswith("base/"):
        return base[1] if base else ""
    return _ground(path.parent / base[1])


def method(name: str) -> Method:
    """The packaged method called `name`. Raises UserError where there is none."""
    head = []
    for line in configuration.find_data_file(name, "configs").read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    text = " ".join(head)
    text, _, cost = text.partition(" Cost: ")
    text, _, reports = text.partition(" Reports: ")
    title, _, about = text.partition(": ")
    return Method(name, title, about, reports, cost, configuration.load(name))


def markdown(methods: Sequence[Method], measured: str = "") -> str:
    """The document: methods by what they need, each method, relations, each term, and what was `measured`."""
    parts = [HEAD, _by_need(methods), METHODS, *map(_method, methods), RELATED, _relations(), TERMS_HEAD]
    parts += [_term(TERMS.entry(name), methods) for name in TERMS]
    if measured:
        parts += [MEASURED, measured]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _by_need(methods: Sequence[Method]) -> str:
    rows: dict[str, list[str]] = {}
    for found in methods:
        rows.setdefault(", ".join(found.needs) or "pairs alone", []).append(f"[{found.name}](#{found.name})")
    lines = [f"| {needs} | {', '.join(names)} |" for needs, names in sorted(rows.items(), key=lambda row: len(row[0]))]
    return "\n".join(["| you have, beside pairs | methods |", "|---|---|", *lines])


def _method(found: Method) -> str:
    terms = " + ".join(_call(name, settings) for name, settings in found.config.objective.items())
    lines = [
        f"### {found.name}",
        f"{found.title}: {found.about}",
        f"- objective: {terms}",
        f"- needs: {', '.join(found.needs) or 'pairs alone'}",
        f"- reported: {found.reports}",
        f"- cost: {found.cost}",
    ]
    return "\n".join([lines[0], "", lines[1], "", *lines[2:]])


def _call(name: str, settings: dict[str, Any]) -> str:
    """A term with its weight and settings, linked to its description."""
    weight = settings.get("weight", 1.0)
    others = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "weight")
    linked = f"[{name}](#term-{name})" + (f" ({others})" if others else "")
    return linked if weight == 1.0 else f"{weight:g} · {linked}"


def _relations() -> str:
    lines = []
    for left, right, when in RELATIONS:
        lines.append(f"- {_said(left)} is {_said(right)}{' ' + when if when else ''}")
    return "\n".join(lines)


def _said(side: Side) -> str:
    name, settings = side
    return "`" + name + (": {" + ", ".join(f"{k}: {v}" for k, v in settings.items()) + "}" if settings else "") + "`"


def _term(entry: Entry, methods: Sequence[Method]) -> str:
    used = ", ".join(f"`{found.name}`" for found in methods if entry.name in found.config.objective)
    settings = ", ".join(f"`{key}: {_default(parameter)}`" for key, parameter in entry.settings.items())
    lines = [
        f'### <a id="term-{entry.name}"></a>{entry.name}',
        "",
        "```text",
        inspect.getdoc(entry.target) or "",
        "```",
        "",
        f"- settings: `weight: 1`{', ' + settings if settings else ''}",
    ]
    if entry.needs:
        lines.append(f"- needs: {', '.join(NEEDS.get(need, need) for need in entry.needs)}")
    if used:
        lines.append(f"- in: {used}")
    return "\n".join(lines)


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


HEAD = """
# Methods

Every method that clipkit trains by: a packaged config each, made of terms. `clipkit train NAME` trains it, `clipkit
config show NAME` prints it whole, `clipkit sweep NAME NAME ...` compares several under equal conditions. This page is
made from the configs and the docstrings by `clipkit methods --markdown`.

## Which method for which data
"""

METHODS = """
## The methods

*Reported* is what the authors, or who is named, say of their own setting. A factor before a term is its weight.
"""

RELATED = """
## Relations between terms

Each is checked in value and gradient by the tests.
"""

TERMS_HEAD = """
## The terms

What an `objective:` can be made of. Embeddings have unit length; v are pictures, t captions, n negative captions, s the
learned scale (1/temperature), * the teacher's. All are means over pairs, so weights do not depend on the batch size.
Where other pairs are rivals, those of the same picture are not, unless `mask_same_group: false`. A pair with no valid
negative, or nothing to be told from, adds nothing. In Python `TERMS["igc"](z, **settings)`; a term that remembers
something is made first: `TERMS["rank"](**settings)(z)`.
"""

MEASURED = """
## Measured

On the generated picture world, under equal conditions, by `clipkit sweep`: each method's weights as published, not
tuned here.
"""
