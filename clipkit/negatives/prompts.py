"""Prompts for a language model: files with a rule and examples a kind, versioned, so that answers can name them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from random import Random
from string import Template
from typing import Any

import yaml

from clipkit.errors import UserError, did_you_mean

SHOTS = 5
"""Examples a prompt, as DeGLA's (arXiv 2504.16801)."""
FRAME = "frame.yaml"
"""What the prompts of kinds have in common, unless a kind's `frame` names another: frame_NAME.yaml. Where a picture is
shown, it is frame_pictured.yaml, or frame_NAME_pictured.yaml."""


@dataclass(frozen=True)
class Prompt:
    """How one kind is asked for. `mark` is the version of its file and a digest of all that it is made of."""

    kind: str
    mark: str
    rule: str
    goal: str
    examples: tuple[tuple[str, tuple[str, ...]], ...]
    """(caption, rewrites) each."""
    frame: str

    def text(self, caption: str, count: int, seed: int) -> str:
        """The question. All but the caption is the same for one (count, seed): servers may keep it."""
        shown = Random(f"{seed}:{self.kind}").sample(self.examples, min(SHOTS, len(self.examples)))
        examples = (f"Caption: {_quoted(given)}\n{answer(self.kind, texts[:count])}" for given, texts in shown)
        return Template(self.frame).substitute(
            kind=self.kind,
            rule=self.rule,
            goal=self.goal,
            count=count,
            examples="\n\n".join(examples),
            caption=_quoted(caption),
        )


def answer(kind: str, texts: Sequence[str]) -> str:
    """The answer that is asked for."""
    return json.dumps({"kind": kind, "texts": list(texts)}, ensure_ascii=False)


def load_prompts(
    kinds: Sequence[str], folder: str | Path | None = None, *, pictured: bool = False
) -> dict[str, Prompt]:
    """The prompts of these kinds: KIND.yaml in `folder` where it lies there, else the packaged one.

    `pictured`: to be sent with a picture. Raises UserError for an unknown kind and for a file that is no prompt.
    """
    packaged = resources.files("clipkit.negatives") / "data" / "prompts"
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of prompts")
    places: list[Any] = [*([Path(folder)] if folder else []), packaged]
    files = {file.name: file for place in reversed(places) for file in place.iterdir() if file.name.endswith(".yaml")}
    known = [name.removesuffix(".yaml") for name in files if not name.startswith("frame")]
    for kind in kinds:
        if kind not in known:
            raise UserError(f"{kind}: no prompt for this kind{did_you_mean(kind, known)}")
    frames = {name: file.read_bytes() for name, file in files.items() if name.startswith("frame")}
    chosen = {kind: files[f"{kind}.yaml"] for kind in kinds}
    return {kind: _read(kind, file.read_bytes(), frames, str(file), pictured) for kind, file in chosen.items()}


def _read(kind: str, data: bytes, frames: dict[str, bytes], where: str, pictured: bool) -> Prompt:
    try:
        own = yaml.safe_load(data)
        name = f"frame_{own['frame']}.yaml" if "frame" in own else FRAME
        frame = frames[name.replace(".yaml", "_pictured.yaml") if pictured else name]
        common = yaml.safe_load(frame)
        examples = tuple((_text(e["caption"]), tuple(map(_text, e["texts"]))) for e in own["examples"])
        digest = blake2b(data + frame, digest_size=4).hexdigest()
        mark = f"{int(own['version'])}.{int(common['version'])}-{digest}"
        prompt = Prompt(kind, mark, _text(own["rule"]).strip(), common[own["goal"]], examples, common["text"].strip())
        _try(prompt)
        return prompt
    except (yaml.YAMLError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where}: no prompt ({type(error).__name__}: {error}); it needs version, goal (one of the"
            " frame's: negative, paraphrase), rule and examples of caption and texts, as the packaged ones in"
            " clipkit/negatives/data/prompts"
        ) from None


def _try(prompt: Prompt) -> None:
    """Raises ValueError for a frame that no question can be made of."""
    try:
        prompt.text("", 1, 0)
    except KeyError as error:
        known = "kind, rule, goal, count, examples, caption"
        raise ValueError(f"the frame's text names ${error.args[0]}; it may name {known}, and writes $$ for $") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _quoted(caption: str) -> str:
    return json.dumps(caption, ensure_ascii=False)
