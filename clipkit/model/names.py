"""open_clip names → parts of a dual encoder, with the activation the weights were trained with.

OpenAI's weights (and many others) need QuickGELU. Built with GELU they load without a word and score points lower; the
published rows of several fine-tuned models suffer from it. So a tag brings its own activation, and weights that
contradict the name, or cannot be trusted to agree with it, are an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import safe_open

from clipkit.data.decode import Preprocess
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError, did_you_mean
from clipkit.model.spec import Spec, find_checkpoint, open_clip_spec
from clipkit.model.towers import Towers, open_clip_towers, trims_exactly

SCHEMES = ("hf-hub:", "local-dir:")
"""References that open_clip resolves itself, config and weights together."""


class Parts(NamedTuple):
    """All that a DualEncoder is made of."""

    spec: Spec
    towers: Towers
    tokenizer: Tokenizer
    preprocess: Preprocess
    scale: float = 1 / 0.07
    bias: float | None = None


class Reference(NamedTuple):
    """What open_clip is asked for."""

    architecture: str
    pretrained: str | None
    quick_gelu: bool


def from_open_clip(name: str) -> Parts:
    """Parts of `NAME`, `NAME:TAG`, `NAME:FILE`, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.

    Raises UserError for names and tags open_clip does not know, weights it cannot fetch or load, and activations that
    do not match.
    """
    architecture, pretrained, quick_gelu = resolve(name)
    try:
        model = open_clip.create_model(
            architecture, pretrained, force_quick_gelu=quick_gelu, force_custom_text=True, weights_only=True
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{name}: open_clip could not load it: {error}") from error
    spec = open_clip_spec(_config(architecture), quick_gelu=quick_gelu)
    state = model.state_dict()
    towers = open_clip_towers(model)
    return Parts(
        spec,
        towers,
        _tokenizer(architecture, spec["text"], towers.text),
        _preprocess(name, open_clip.get_model_preprocess_cfg(model)),
        scale=float(state["logit_scale"].exp()),
        bias=float(state["logit_bias"]) if "logit_bias" in state else None,
    )


def preprocess_of_name(name: str) -> Preprocess:
    """What `from_open_clip(name).preprocess` is; weights are fetched for it only with a hub's or folder's reference."""
    architecture, pretrained, _ = resolve(name)
    if name.startswith(SCHEMES):
        return from_open_clip(name).preprocess
    tag = open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else {}
    size = _config(architecture)["vision_cfg"].get("image_size", open_clip.CLIPVisionCfg.image_size)
    return _preprocess(name, merge_preprocess_dict(PreprocessCfg(), tag) | {"size": size})


def resolve(name: str) -> Reference:
    """Architecture, weights and activation meant by `name`. `NAME-gelu:FILE` says that a file's weights need GELU."""
    if name.startswith(SCHEMES):
        return Reference(name, None, _config(name).get("quick_gelu", False))
    stem, _, pretrained = name.partition(":")
    architecture = stem.replace("/", "-")
    if architecture not in open_clip.list_models():
        architecture = architecture.removesuffix("-gelu")
    says_gelu = architecture != stem.replace("/", "-")
    built = _config(architecture).get("quick_gelu", False)
    if not pretrained:
        return Reference(architecture, None, built)
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    if tag:
        needed = tag.get("quick_gelu", False)
        if says_gelu and needed:
            raise UserError(
                f"{name}: {pretrained} was trained with quickgelu; under gelu its numbers are quietly wrong. "
                f"Use {architecture}:{pretrained}"
            )
        return Reference(architecture, pretrained, needed)
    if not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        raise UserError(f"{name}: {pretrained} is neither a file nor a tag{did_you_mean(pretrained, tags)}")
    _check_file(name, architecture, Path(pretrained), says_gelu or built)
    return Reference(architecture, pretrained, built)


def _check_file(name: str, architecture: str, file: Path, decided: bool) -> None:
    """Refuse weights that were trained with another activation than `architecture` builds, or might have been."""
    quick = f"{architecture}-quickgelu"
    built = "quickgelu" if _config(architecture).get("quick_gelu", False) else "gelu"
    stored = stored_activation(file)
    if stored and stored != built:
        use = quick if stored == "quickgelu" else f"{architecture.removesuffix('-quickgelu')}-gelu"
        raise UserError(f"{name}: {file} was trained with {stored}, {architecture} builds {built}; use {use}:{file}")
    if find_checkpoint(file):
        raise UserError(f"{name}: {file} is a checkpoint of clipkit's own, architecture included; load {file.parent}")
    if not stored and not decided and quick in open_clip.list_models():
        raise UserError(
            f"{name}: {file} does not say which activation it was trained with, and the wrong one gives quietly wrong "
            f"numbers. Use {quick}:{file} (OpenAI's weights and what was tuned from them) or {architecture}-gelu:{file}"
        )


def stored_activation(file: Path) -> str | None:
    """The activation in a safetensors file's metadata, where clipkit writes it."""
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="pt") as weights:
        return (weights.metadata() or {}).get("activation")


def _config(architecture: str) -> dict[str, Any]:
    try:
        cfg = open_clip.get_model_config(architecture)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{architecture}: its config could not be read: {error}") from error
    if cfg is None:
        raise UserError(
            f"open_clip has no model called {architecture}{did_you_mean(architecture, open_clip.list_models())}"
        )
    return cfg


def _tokenizer(architecture: str, text_cfg: dict[str, Any], text: Any) -> Tokenizer:
    own = {"hf_tokenizer_name", "tokenizer_kwargs"} & text_cfg.keys() or "siglip" in architecture.lower()
    length = text_cfg.get("context_length", 77)
    return tokenizer_of(architecture if own else "clip", context_length=length, trim=trims_exactly(text))


def tokenizer_of(name: str, **settings: Any) -> Tokenizer:
    """The tokenizer called `name`. Raises UserError when its files cannot be fetched."""
    try:
        return Tokenizer(name, **settings)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{name}: its tokenizer could not be loaded: {error}") from error


def _preprocess(name: str, cfg: dict[str, Any]) -> Preprocess:
    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or cfg["resize_mode"] == "longest":
        raise UserError(f"{name}: pictures of {height} × {width} resized to the {cfg['resize_mode']} are not supported")
    return Preprocess(
        size=height,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        resize=cfg["resize_mode"],
        interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
    )
