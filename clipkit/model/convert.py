"""transformers CLIP folders → the same towers open_clip builds: equal embeddings, one kind of model in the house."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from clipkit.data.decode import Preprocess
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.model.names import Parts
from clipkit.model.spec import VOCABULARY, Spec
from clipkit.model.towers import build_towers, trims_exactly

ACTIVATIONS = {"quick_gelu": "quickgelu", "gelu": "gelu"}
FIRST_SPECIAL = VOCABULARY - 2
"""CLIP's start and end marks come last; transformers spells them differently."""

_OUTER = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    **{f"vision_model.pre_layrnorm.{part}": f"visual.ln_pre.{part}" for part in ("weight", "bias")},
    **{f"vision_model.post_layernorm.{part}": f"visual.ln_post.{part}" for part in ("weight", "bias")},
    **{f"text_model.final_layer_norm.{part}": f"text.ln_final.{part}" for part in ("weight", "bias")},
}
_INNER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def from_transformers(folder: Path) -> Parts:
    """Parts of a folder written by `CLIPModel.save_pretrained`, its tokenizer and image processor beside it.

    Raises UserError for other model types, activations, vocabularies and preprocessing than CLIP's own kind.
    """
    config = _config(folder)
    spec = _spec(folder, config)
    towers = build_towers(spec)
    weights = _weights(folder)
    state = _rename(weights, spec)
    for tower, prefix in ((towers.image, "visual."), (towers.text, "text.")):
        tower.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    _check_vocabulary(folder, spec["text"]["vocab_size"])
    tokenizer = Tokenizer("clip", spec["text"]["context_length"], trim=trims_exactly(towers.text))
    preprocess = _preprocess(folder, spec["image"]["cfg"]["image_size"])
    return Parts(spec, towers, tokenizer, preprocess, scale=float(weights["logit_scale"].exp()))


def _config(folder: Path) -> Any:
    from transformers import CLIPConfig

    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "clip":
        raise UserError(f"{folder}: is a transformers model of type {kind}; only clip can be loaded")
    return CLIPConfig.from_pretrained(folder)


def _spec(folder: Path, config: Any) -> Spec:
    vision, text = config.vision_config, config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    if len(acts) > 1 or not acts <= ACTIVATIONS.keys():
        raise UserError(f"{folder}: activations {', '.join(sorted(acts))} are not one of {', '.join(ACTIVATIONS)}")
    spec: Spec = {
        "embed_dim": config.projection_dim,
        "activation": ACTIVATIONS[acts.pop()],
        "image": {
            "kind": "open_clip",
            "cfg": {
                **_sizes(vision),
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "patch_size": vision.patch_size,
                "image_size": vision.image_size,
            },
        },
        "text": {
            **_sizes(text),
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
        },
        "dropout": 0.0,
    }
    return spec


def _sizes(tower: Any) -> dict[str, Any]:
    sizes = {
        "width": tower.hidden_size,
        "layers": tower.num_hidden_layers,
        "mlp_ratio": tower.intermediate_size / tower.hidden_size,
    }
    return sizes if tower.layer_norm_eps == 1e-5 else {**sizes, "norm_kwargs": {"eps": tower.layer_norm_eps}}


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(
            f"{folder}: has no model.safetensors; save it again with save_pretrained (clipkit unpickles nothing)"
        )
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def _rename(weights: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    state = {new: weights[old] for old, new in _OUTER.items()}
    state["visual.proj"] = weights["visual_projection.weight"].T.contiguous()
    state["text.text_projection"] = weights["text_projection.weight"].T.contiguous()
    for kind, prefix, layers in (
        ("vision_model", "visual", spec["image"]["cfg"]["layers"]),
        ("text_model", "text", spec["text"]["layers"]),
    ):
        for layer in range(layers):
            old, new = f"{kind}.encoder.layers.{layer}", f"{prefix}.transformer.resblocks.{layer}"
            for part in ("weight", "bias"):
                state |= {f"{new}.{b}.{part}": weights[f"{old}.{a}.{part}"] for a, b in _INNER.items()}
                stacked = [weights[f"{old}.self_attn.{which}_proj.{part}"] for which in "qkv"]
                state[f"{new}.attn.in_proj_{part}"] = torch.cat(stacked)
    return state


def _check_vocabulary(folder: Path, size: int) -> None:
    """Texts are cut by CLIP's own byte pairs; a folder with another vocabulary would be read in the wrong words."""
    vocabulary = _vocabulary(folder)
    own = {token: number for token, number in open_clip.SimpleTokenizer().encoder.items() if number < FIRST_SPECIAL}
    theirs = {token: number for token, number in vocabulary.items() if number < FIRST_SPECIAL}
    if size != VOCABULARY or (vocabulary and own != theirs):
        raise UserError(f"{folder}: its vocabulary of {size} tokens is not CLIP's own, the only one that can be loaded")


def _vocabulary(folder: Path) -> dict[str, int]:
    if (folder / "vocab.json").is_file():
        return json.loads((folder / "vocab.json").read_text())
    if (folder / "tokenizer.json").is_file():
        return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return {}


def _preprocess(folder: Path, image_size: int) -> Preprocess:
    from transformers import CLIPImageProcessor

    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        return Preprocess(size=image_size)
    found: Any = CLIPImageProcessor.from_pretrained(folder)
    crops = found.size.get("shortest_edge") == image_size and found.do_center_crop
    if not crops and (found.size.get("height"), found.size.get("width")) != (image_size, image_size):
        raise UserError(f"{folder}: preprocessing to {dict(found.size)} does not fit pictures of {image_size} pixels")
    return Preprocess(
        size=image_size,
        mean=tuple(found.image_mean),
        std=tuple(found.image_std),
        resize="shortest" if crops else "squash",
        interpolation="bilinear" if int(found.resample) == 2 else "bicubic",
    )
