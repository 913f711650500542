"""What a dual encoder is made of, as a JSON-able `spec`: compared before anything is built, rebuilt by `towers`.

    {"embed_dim": 128, "activation": "gelu",
     "image": {"kind": "timm", "name": "resnet18", "cfg": {...}, "pool": "attention", "size": 96, HEAD}
            | {"kind": "conv", "layers": [[32, 2], ...], "pool": "attention", "size": 64, HEAD}
            | {"kind": "open_clip", "cfg": {CLIPVisionCfg}},
     "text": {CLIPTextCfg}
           | {"features": 4096, "layers": 4, "context_length": 77, "embedder": "..."},
     "dropout": 0.0}
    HEAD: nothing for a linear one | "head": "root", "dropout": 0.3

Nothing here imports torch or the towers' libraries unless it must, so that what does not fit is said at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from clipkit.data.tags import vocabulary
from clipkit.errors import UserError, did_you_mean
from clipkit.settings import HeadsConfig, ModelConfig, TextTower

Spec = dict[str, Any]
VOCABULARY = 49408
"""CLIP's byte-pair vocabulary."""
MODEL, WEIGHTS = "model.json", "model.safetensors"
STEP = r"step_\d{8,}"
"""What the folder of a checkpoint is called."""
SHOWN = 80
"""Letters of a setting that a message shows."""
_WITHOUT_WEIGHT = {"dropout", "patch_dropout", "timm_drop", "timm_drop_path", "output_tokens", "timm_model_pretrained"}
_WITHOUT_WEIGHT |= {"hf_model_pretrained", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "drop_path_rate"}
_WITHOUT_WEIGHT |= {"embedder"}
"""Settings that may differ between weights and model."""


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint folder meant by a checkpoint folder, its weights file, or a run folder (the newest); else None."""
    path = Path(path)
    folder = path.parent if path.name == WEIGHTS else path
    if (folder / MODEL).is_file():
        return folder
    return next((step for step in reversed(whole_checkpoints(folder)) if (step / MODEL).is_file()), None)


def whole_checkpoints(run: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first; a folder of another name, such as a copy, is none."""
    return sorted(path for path in run.glob("checkpoints/step_*") if re.fullmatch(STEP, path.name))


def checkpoint_at(path: str | Path) -> Path:
    """`find_checkpoint`, with a UserError where there is none."""
    folder = find_checkpoint(path)
    if folder is None:
        raise UserError(f"{path}: holds no checkpoint: neither {MODEL} nor checkpoints/step_*/{MODEL}")
    return folder


def read_model_json(folder: Path) -> dict[str, Any]:
    """A checkpoint's description of itself. Raises UserError when it is not one of clipkit's."""
    try:
        about = json.loads((folder / MODEL).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{folder / MODEL}: not JSON: {error}") from None
    if "spec" not in about:
        raise UserError(f"{folder / MODEL}: not written by clipkit: it has no spec")
    return about


def custom_spec(config: ModelConfig) -> Spec:
    """The spec of a model of one's own making, from `model.image`, `model.text` and `model.embed_dim`.

    Raises UserError for settings of `model.image.cfg` that open_clip's image towers do not have.
    """
    if not config.image.timm and not config.image.conv:
        import open_clip

        _check_names("model.image.cfg", config.image.cfg, open_clip.CLIPVisionCfg)
    return _custom_spec(config)


def _custom_spec(config: ModelConfig) -> Spec:
    """As `custom_spec`, without the seconds that looking up open_clip's settings takes."""
    image, text = config.image, config.text
    if image.timm:
        vision: Spec = {"kind": "timm", "name": image.timm, "cfg": image.cfg, "pool": image.pool, "size": image.size}
    elif image.conv:
        vision = {"kind": "conv", "layers": image.conv, "pool": image.pool, "size": image.size}
    else:
        if image.cfg.get("image_size", image.size) != image.size:
            raise UserError(
                f"model.image.cfg.image_size: {image.cfg['image_size']}, but model.image.size is {image.size}"
            )
        vision = {"kind": "open_clip", "cfg": {**image.cfg, "image_size": image.size}}
    if image.head == "root" and vision["kind"] != "open_clip":
        vision |= {"head": "root", "dropout": image.dropout}
    elif image.head == "root" or image.dropout:
        raise UserError("model.image: head and dropout are for timm and conv towers, and dropout for `head: root` only")
    spec = {
        "embed_dim": config.embed_dim,
        "activation": "gelu",
        "image": vision,
        "text": text_spec(text),
        "dropout": text.dropout,
    }
    return json.loads(json.dumps(spec))


def heads_spec(config: HeadsConfig) -> Spec:
    """What a spec says of `config`'s heads, the words of their vocabulary included; nothing where there are none."""
    heads: Spec = {name: {} for name in ("image", "text") if getattr(config, name)}
    if config.tags.vocabulary:
        heads["tags"] = {"on": config.tags.on, "words": list(vocabulary(config.tags.vocabulary))}
    if config.aspects.count:
        heads["aspects"] = config.aspects.model_dump()
    return {"heads": heads} if heads else {}


def text_spec(text: TextTower) -> Spec:
    """Of an adapter on stored features where `features` gives their width, else of a transformer on tokens."""
    if text.features:
        return text.model_dump(include={"features", "layers", "context_length", "embedder"})
    return {"vocab_size": VOCABULARY, **text.model_dump(exclude={"dropout", "features", "embedder"})}


def open_clip_spec(cfg: dict[str, Any], *, quick_gelu: bool) -> Spec:
    """The spec of an open_clip model config; base weights of its towers are never fetched when it is rebuilt."""
    vision, text = dict(cfg["vision_cfg"]), dict(cfg["text_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    spec = {
        "embed_dim": cfg["embed_dim"],
        "activation": "quickgelu" if quick_gelu else "gelu",
        "image": {"kind": "open_clip", "cfg": vision},
        "text": text,
        "dropout": 0.0,
    }
    return json.loads(json.dumps(spec))


def _check_names(path: str, cfg: dict[str, Any], schema: type) -> None:
    valid = {f.name for f in dataclasses.fields(schema)}
    problems = [f"{path}.{name}: no such setting{did_you_mean(name, valid)}" for name in cfg if name not in valid]
    if problems:
        raise UserError("\n".join(problems))


def check_start(config: ModelConfig) -> None:
    """Raises UserError when `config.start` holds no checkpoint, or one whose settings contradict `config`'s.

    What only one side names has a default of open_clip's or timm's; that, and the tensors, are for `weights_into`.
    """
    if not config.start:
        return
    folder = checkpoint_at(config.start)
    there = read_model_json(folder)["spec"]
    here = heads_spec(config.heads) | ({} if config.name else _custom_spec(config))
    there, here = _both_towers(there, here)
    if problems := _differences(_flat(there), _flat(here), unnamed=False):
        raise another_architecture(folder, problems)


def differing_settings(there: Spec, here: Spec) -> list[str]:
    """One line for each setting that decides what the weights mean and differs, the plainest difference first.

    That only one side has a head is none.
    """
    both = there.get("heads", {}).keys() & here.get("heads", {}).keys()
    there, here = _both_towers(
        *(_with_defaults(spec) | {"heads": {name: spec["heads"][name] for name in both}} for spec in (there, here))
    )
    return _differences(_flat(there), _flat(here), unnamed=True)


def adapts_text(there: Spec, here: Spec) -> bool:
    """Whether `here` reads stored features of texts where `there` read tokens: its text tower is a new one."""
    return "features" in here.get("text", {}) and "features" not in there["text"]


def _both_towers(there: Spec, here: Spec) -> tuple[Spec, Spec]:
    """The specs, without what they say of the text tower where that is a new one."""
    if not adapts_text(there, here):
        return there, here
    return tuple({k: v for k, v in spec.items() if k not in ("text", "dropout")} for spec in (there, here))  # type: ignore[return-value]


def another_architecture(folder: Path, problems: list[str]) -> UserError:
    """The error for weights in `folder` that are not the model's."""
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return UserError(f"{folder}: is of another architecture than the model:\n  " + "\n  ".join(problems[:3]) + more)


def _differences(there: dict[str, Any], here: dict[str, Any], *, unnamed: bool) -> list[str]:
    """`unnamed`: whether a setting that one side does not name counts as different."""
    both = there.keys() & here.keys()
    # The activation, then what both sides name, the outermost first.
    names = sorted(
        there.keys() | here.keys() if unnamed else both,
        key=lambda name: (name != "activation", name not in both, name.count("."), name),
    )
    out = []
    for name in names:
        a, b = (json.dumps(flat.get(name)) for flat in (there, here))
        if a != b and name.rpartition(".")[2] not in _WITHOUT_WEIGHT:
            why = "; under another activation the numbers are quietly wrong" if name == "activation" else ""
            out.append(f"{name}: {shorten(a)} there, {shorten(b)} here{why}")
    return out


def shorten(text: str) -> str:
    """A long list (a vocabulary) by its beginning, its length and its end."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … ({len(text)} letters) … {text[-SHOWN // 2 :]}"


def _with_defaults(spec: Spec) -> Spec:
    import open_clip

    image = spec["image"]
    if image["kind"] == "open_clip":
        image = {**image, "cfg": dataclasses.asdict(open_clip.CLIPVisionCfg()) | image["cfg"]}
    text = spec["text"] if "features" in spec["text"] else dataclasses.asdict(open_clip.CLIPTextCfg()) | spec["text"]
    return {**spec, "image": image, "text": text}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out
