"""transformers CLIP folders → the same towers open_clip builds, and back: equal embeddings, one kind of model here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
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
SIZES = ("width", "layers", "mlp_ratio", "norm_kwargs")
"""What both towers of transformers' CLIP can be told, in open_clip's words."""
KEPT = {
    "image": (*SIZES, "head_width", "patch_size", "image_size"),
    "text": (*SIZES, "heads", "context_length", "vocab_size"),
}
NO_MATTER = ("patch_dropout", "output_tokens", "timm_model_pretrained", "hf_model_pretrained")
"""Settings that embeddings do not depend on."""
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
    for old, new in _layers(spec):
        for part in ("weight", "bias"):
            state |= {f"{new}.{b}.{part}": weights[f"{old}.{a}.{part}"] for a, b in _INNER.items()}
            stacked = [weights[f"{old}.self_attn.{which}_proj.{part}"] for which in "qkv"]
            state[f"{new}.attn.in_proj_{part}"] = torch.cat(stacked)
    return state


def _layers(spec: Spec) -> Iterator[tuple[str, str]]:
    """What every layer is called there and here."""
    for kind, prefix, layers in (
        ("vision_model", "visual", _setting(spec["image"]["cfg"], "layers", open_clip.CLIPVisionCfg)),
        ("text_model", "text", _setting(spec["text"], "layers", open_clip.CLIPTextCfg)),
    ):
        for layer in range(layers):
            yield f"{kind}.encoder.layers.{layer}", f"{prefix}.transformer.resblocks.{layer}"


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


def to_transformers(
    spec: Spec, state: dict[str, Tensor], tokenizer: Tokenizer, preprocess: Preprocess, folder: Path
) -> Any:
    """Write what `CLIPModel.from_pretrained` reads, tokenizer and image processor beside it; returns the CLIPModel.

    `state`: a DualEncoder's. Raises UserError for towers and tokenizers other than CLIP's own kind.
    """
    from transformers import CLIPConfig, CLIPModel

    _check_kind(spec, tokenizer)
    act = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == spec["activation"])
    vision, text = spec["image"]["cfg"], spec["text"]
    config = CLIPConfig(
        projection_dim=spec["embed_dim"],
        vision_config=_their_sizes(vision, act, open_clip.CLIPVisionCfg)
        | {"image_size": preprocess.size, "patch_size": _setting(vision, "patch_size", open_clip.CLIPVisionCfg)},
        text_config=_their_sizes(text, act, open_clip.CLIPTextCfg)
        | {"max_position_embeddings": tokenizer.context_length, "vocab_size": VOCABULARY}
        | {"bos_token_id": FIRST_SPECIAL, "eos_token_id": FIRST_SPECIAL + 1, "pad_token_id": FIRST_SPECIAL + 1},
    )
    model = CLIPModel(config).eval()
    model.load_state_dict(_rename_back(state, spec), strict=False)  # position numbers are no weights
    model.save_pretrained(folder)
    _write_tokenizer(folder, tokenizer.context_length)
    _processor(preprocess).save_pretrained(folder)
    return model


def _check_kind(spec: Spec, tokenizer: Tokenizer) -> None:
    def refuse(what: str) -> UserError:
        return UserError(f"--to transformers: its CLIP has no place for {what}; use --to open_clip or --to onnx")

    if spec["image"]["kind"] != "open_clip":
        raise refuse(f"image towers of this kind ({spec['image']['kind']})")
    if "features" in spec["text"]:
        raise refuse("text towers that read stored features")
    for tower, cfg, schema in (
        ("image", spec["image"]["cfg"], open_clip.CLIPVisionCfg),
        ("text", spec["text"], open_clip.CLIPTextCfg),
    ):
        for name, value in cfg.items():
            if name not in (*KEPT[tower], *NO_MATTER) and value != _setting({}, name, schema):
                raise refuse(f"{name}: {value} of the {tower} tower")
        if not isinstance(_setting(cfg, "layers", schema), int):
            raise refuse("ResNets")
        if odd := set(cfg.get("norm_kwargs") or {}) - {"eps"}:
            raise refuse(f"norm_kwargs.{min(odd)} of the {tower} tower")
    if tokenizer.name != "clip" or _setting(spec["text"], "vocab_size", open_clip.CLIPTextCfg) != VOCABULARY:
        raise refuse(f"the tokenizer {tokenizer.name}")


def _setting(cfg: dict[str, Any], name: str, schema: Any) -> Any:
    """Of a tower, with open_clip's default."""
    default = next((field.default for field in dataclasses.fields(schema) if field.name == name), None)
    return cfg.get(name, default)


def _their_sizes(cfg: dict[str, Any], act: str, schema: Any) -> dict[str, Any]:
    width, heads = _setting(cfg, "width", schema), _setting(cfg, "heads", schema)
    heads = heads or width // _setting(cfg, "head_width", schema)  # the one is told of texts, the other of pictures
    return {
        "hidden_size": width,
        "num_hidden_layers": _setting(cfg, "layers", schema),
        "num_attention_heads": heads,
        "intermediate_size": int(width * _setting(cfg, "mlp_ratio", schema)),
        "layer_norm_eps": (cfg.get("norm_kwargs") or {}).get("eps", 1e-5),
        "hidden_act": act,
    }


def _rename_back(state: dict[str, Tensor], spec: Spec) -> dict[str, Tensor]:
    """The inverse of `_rename`, from a DualEncoder's names."""
    ours = {f"visual.{n.removeprefix('image_tower.')}": x for n, x in state.items() if n.startswith("image_tower.")}
    ours |= {f"text.{n.removeprefix('text_tower.')}": x for n, x in state.items() if n.startswith("text_tower.")}
    out = {old: ours[new] for old, new in _OUTER.items()}
    out["visual_projection.weight"] = ours["visual.proj"].T
    out["text_projection.weight"] = ours["text.text_projection"].T
    out["logit_scale"] = state["log_scale"][0]
    for old, new in _layers(spec):
        for part in ("weight", "bias"):
            out |= {f"{old}.{a}.{part}": ours[f"{new}.{b}.{part}"] for a, b in _INNER.items()}
            stacked = ours[f"{new}.attn.in_proj_{part}"].chunk(3)
            out |= {f"{old}.self_attn.{which}_proj.{part}": x for which, x in zip("qkv", stacked)}
    return {name: x.float().contiguous() for name, x in out.items()}


def _write_tokenizer(folder: Path, context_length: int) -> None:
    """CLIP's byte pairs in the files that every release of transformers reads."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    own = open_clip.SimpleTokenizer()
    vocabulary = {token: number for token, number in own.encoder.items() if number < FIRST_SPECIAL}
    vocabulary |= {start: FIRST_SPECIAL, end: FIRST_SPECIAL + 1}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in own.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    about = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1))


def _processor(preprocess: Preprocess) -> Any:
    """The inverse of `_preprocess`."""
    from transformers import CLIPImageProcessor

    side = preprocess.size
    shortest = preprocess.resize == "shortest"
    return CLIPImageProcessor(
        size={"shortest_edge": side} if shortest else {"height": side, "width": side},
        do_center_crop=shortest,
        crop_size={"height": side, "width": side},
        resample=2 if preprocess.interpolation == "bilinear" else 3,
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
    )
