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

RUNS = ("base/world.yaml", "base/flickr8k.yaml", "base/abstract_scenes.yaml")
"""Configs on one of these, perhaps through another, are runs on given data; all others but `debug` are methods."""

NEEDS = {
    "negative_text": "negative captions",
    "negative_image": "pictures of negatives",
    "alternates": "similar pictures",
    "positives": "several captions a picture",
    "view_image": "views",
    "local_logit": "patches and words",
    "text_features": "stored text features",
    "teacher": "a teacher",
    "frozen teacher": "a frozen teacher",
    "precomputed teacher": "stored embeddings of a teacher",
    "locked image": "a locked image tower",
    "tag_logits": "tags",
    "image_aspects": "further projections",
    "label": "classes",
    "bias": "a learned bias",
    "relevance": "relevance",
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
        config, data = self.config, self.config.data
        asked = {need for name in config.objective for need in needs(name)} - {"teacher"}
        used = {
            "negative_text": data.negatives,
            "negative_image": data.negative_images,
            "alternates": data.alternates,
            "positives": data.positives,
            "view_image": data.views,
            "text_features": config.model.text.features,
            "label": data.labels,
            "locked image": config.model.lock_image,
            "bias": config.model.bias is not None,
            {"ema": "teacher"}.get(config.teacher.kind, f"{config.teacher.kind} teacher"): True,
        }
        asked |= {name for name, value in used.items() if value}
        return [words for key, words in NEEDS.items() if key in asked]


def needs(term: str) -> list[str]:
    """What a term asks for, by NEEDS' names."""
    found = {"positives" if need == "positive_text" else need for need in TERMS.entry(term).needs}
    if any(need.startswith("teacher.") for need in found):
        found.add("teacher")
    return [name for name in NEEDS if name in found]


def every() -> list[str]:
    """Names of the packaged methods."""
    folder = next(folder for folder in data_folders("configs") if folder.is_dir())
    return sorted(path.stem for path in folder.glob("*.yaml") if _ground(path) not in RUNS and path.stem != "debug")


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
    parts = [HEAD, _by_need(methods), NOTES, METHODS, *map(_method, methods), RELATED, _relations(), TERMS_HEAD]
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
    if asked := needs(entry.name):
        lines.append(f"- needs: {', '.join(NEEDS[name] for name in asked)}")
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

NOTES = """
What the words mean: *negative captions* are `data.negatives` ≥ 1 and captions with negatives in the shards; *several
captions a picture* `data.positives` ≥ 1, or shards with a pair for each and `group` naming the picture; *views*
`data.views` ≥ 1; *relevance*, *tags*, *classes* and *similar pictures* are fields of KEY.json ([shards.md](shards.md));
*stored* features and embeddings are written by `clipkit shards embed`. *Patches and words* come from an open_clip ViT,
`model.image.conv`, or a timm network that averages a map or tokens, with a text tower of open_clip's that pools at the
end of the text.

A *teacher* is `ema` (a moving average; its half-life as a fraction of the run or in samples, with a warm-up), `frozen`
(the student's start, or any model named by `teacher.start`) or `precomputed` (embeddings in the shards). It encodes
what the terms look at, of its `towers`. `gist` and `structure` also take one whose embeddings are of another width.

`sogclr`, `isogclr` and `fastclip` keep some numbers of every sample the run has met, 8 to 36 bytes, divided among the
ranks by the sample's id and whole in `terms.safetensors`. A run goes on with them on any number of ranks; with other
data behind the ids it has to begin anew (`model.start`). `sogclr` and `fastclip` v1 take their temperature from
`model.scale`, which stays as it is; in `isogclr` and v2 it is not used.

Not here: FG-CLIP's terms for regions, which need boxes.
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
tuned here. One seed and 300 steps: too few to learn swaps by negative captions alone (the README's `degla` takes more),
and most methods differ from `clip` by no more than chance; compare with the intervals. Percent with 95 % intervals;
seconds are of training, on one thread. `mv_infonce` and `mv_dhel` are content once a picture finds its own crops, and
forget the captions; `catlip` learns from tags alone, and its pictures leave the captions behind. `paraclip` had the
same captions marked as paraphrases; `llm2clip` and `proclip` read stored features, of the start's own text tower in
place of a language model's, with an adapter that begins fresh.
"""
