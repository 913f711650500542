"""A dual encoder in the form of other programs, or alone in clipkit's own. Axes: n pictures or texts, t tokens, d.

    clipkit        model.json, model.safetensors: the weights without all that resuming a run needs
    open_clip      its hub layout, for `open_clip.create_model("local-dir:FOLDER")` and the Hugging Face hub
    transformers   what `CLIPModel.from_pretrained(FOLDER)` reads, with tokenizer and image processor
    onnx           image.onnx (uint8 `pixels` of the tower's size), text.onnx (`tokens` as long as the context), both to
                   `embeddings` of unit length; about.json (preprocessing, tokenizer, scale)

What was written is read back, by the program that it is for, and has to embed as the model does.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Collection
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from clipkit.errors import UserError
from clipkit.model.convert import to_transformers
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.load import description, load, save
from clipkit.model.spec import MODEL, WEIGHTS, read_model_json
from clipkit.model.tables import write_table

TOLERANCE = 1e-4
"""Between embeddings of unit length, before and after: two programs add up in different orders."""
TEXTS = ["a red cube", "two small dogs, left of a blue door"]


class Embedded(NamedTuple):
    """Two pictures and two texts."""

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n d"]


def export(model: DualEncoder, out: str | Path, to: str, *, overwrite: bool = False, source: str | Path = "") -> Path:
    """Write the model into the folder `out`, whole or not at all, in the form `to` (one of FORMS); returns the folder.

    Raises UserError where the form has no place for something that embeddings depend on, where a library is not
    installed, and for a folder that holds something: unless `overwrite`, and it is an earlier export, and not what the
    model was loaded from (`source`).
    """
    out = Path(out).resolve()
    _refuse_taken(out, description(model).keys(), str(source), overwrite)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}; choose another folder") from None
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)  # the caller's stays where and as it is
    try:
        with torch.no_grad():
            wanted = _embedded(model)
            _compare(FORMS[to](model, partial), wanted, to)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _refuse_taken(out: Path, described: Collection[str], source: str, overwrite: bool) -> None:
    """Raises UserError where something lies that must not make way."""
    if out == Path.cwd():
        raise UserError(f"{out}: is the folder you are in; name a new one")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out}: is there already; choose another folder, or replace it with --overwrite")
    if any(path.resolve().is_relative_to(out) for path in _places(source)):
        raise UserError(f"{out}: is where the model lies, which --overwrite does not remove; choose another folder")
    if not _is_export(out, described):
        raise UserError(
            f"{out}: holds other things than one export, which --overwrite does not remove; choose another folder"
        )


def _places(source: str) -> list[Path]:
    """What a model's reference names here: itself, the FOLDER of local-dir:FOLDER, the FILE of NAME:FILE."""
    scheme, _, place = source.partition(":")
    return [
        *([Path(source)] if source and Path(source).exists() else []),
        *([Path(place)] if Path(place).is_file() or scheme == "local-dir" else []),
    ]


def _is_export(folder: Path, described: Collection[str]) -> bool:
    """Whether nothing lies there but what `export` writes; a merged model and a run's best say more than it would."""
    names = {path.name for path in folder.iterdir()}
    if not any(
        names >= parts and all(fnmatch(name, further) for name in names - parts) for parts, further in PARTS.values()
    ):
        return False
    return MODEL not in names or read_model_json(folder).keys() <= set(described)


def _to_clipkit(model: DualEncoder, folder: Path) -> Embedded:
    save(model, folder)
    return _embedded(load(folder, "cpu"))


def _to_open_clip(model: DualEncoder, folder: Path) -> Embedded:
    image, text = model.spec["image"], model.spec["text"]
    if image["kind"] != "open_clip":
        raise UserError(f"--to open_clip: it does not know image towers of this kind ({image['kind']}); use --to onnx")
    if model.reads_features:
        raise UserError("--to open_clip: it has no text tower that reads stored features; use --to onnx")
    _refuse_projections(model, "open_clip")
    cfg: dict[str, Any] = {
        "embed_dim": model.spec["embed_dim"],
        "quick_gelu": model.activation == "quickgelu",
        "custom_text": True,  # both towers under names of their own, whatever kind they are of
        "vision_cfg": image["cfg"],
        "text_cfg": text,
    }
    state = {f"visual.{name}": x for name, x in model.image_tower.state_dict().items()}
    state |= {f"text.{name}": x for name, x in model.text_tower.state_dict().items()}
    state["logit_scale"] = model.scale.log().squeeze(0)
    if model.bias is not None:
        state["logit_bias"] = model.bias.squeeze(0)
        cfg["init_logit_bias"] = model.bias.item()
    picture = model.preprocess.to_dict()
    about = {"model_cfg": cfg, "preprocess_cfg": picture | {"resize_mode": picture.pop("resize")}}
    (folder / "open_clip_config.json").write_text(json.dumps(about, indent=1))
    write_table(
        {name: x.clone().contiguous() for name, x in state.items()},
        folder / "open_clip_model.safetensors",
        metadata={"activation": model.activation},
    )
    return _embedded(load(folder, "cpu"))  # open_clip builds and fills it


def _to_transformers(model: DualEncoder, folder: Path) -> Embedded:
    _refuse_projections(model, "transformers")
    if model.bias is not None:
        raise UserError("--to transformers: its CLIP has no place for a learned bias; --to open_clip keeps it")
    state = model.state_dict() | {"log_scale": model.scale.log()}  # as it is used: at most scale_max
    theirs = to_transformers(model.spec, state, model.tokenizer, model.preprocess, folder)
    pixels = (_pictures(model).float() / 255 - _column(model.preprocess.mean)) / _column(model.preprocess.std)
    out = theirs(pixel_values=pixels, input_ids=model.tokenizer(TEXTS))
    return Embedded(out.image_embeds, out.text_embeds)


def _to_onnx(model: DualEncoder, folder: Path) -> Embedded:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise UserError(f"--to onnx: needs {', '.join(missing)}; pip install 'clipkit[onnx]'")
    texts = _tokens(model)
    _write_graph(_Images(model), _pictures(model), folder / "image.onnx", "pixels")
    _write_graph(_Texts(model), texts, folder / "text.onnx", "features" if model.reads_features else "tokens")
    about = description(model)
    about |= {"scale": model.scale.item(), "bias": None if model.bias is None else model.bias.item()}
    (folder / "about.json").write_text(json.dumps(about, indent=1))
    return Embedded(_run_graph(folder / "image.onnx", _pictures(model)), _run_graph(folder / "text.onnx", texts))


FORMS = {"clipkit": _to_clipkit, "open_clip": _to_open_clip, "transformers": _to_transformers, "onnx": _to_onnx}
"""What `export` writes, by name: each writes into an empty folder and embeds with what it has written."""
PARTS = {
    "clipkit": ({MODEL, WEIGHTS}, ""),
    "open_clip": ({"open_clip_config.json", "open_clip_model.safetensors"}, ""),
    "transformers": (
        {"config.json", "vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json"},
        "model*.safetensors*",
    ),
    "onnx": ({"image.onnx", "text.onnx", "about.json"}, "*.onnx.data"),
}
"""Each form's files, by which an earlier export is known, and what those are called that depend on the model's size."""


class _Images(nn.Module):
    """uint8 pictures of the tower's size to unit length."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, pixels: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        return self.model.encode_image(pixels)


class _Texts(nn.Module):
    """Tokens padded to the context, or stored features, to unit length; without parts by length, which no graph has."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, texts: Int64[Tensor, "n t"] | Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        if self.model.reads_features:
            return self.model.encode_features(texts)
        embedded = self.model.text_tower(texts)
        if "text" in self.model.heads:
            embedded = self.model.heads["text"](embedded)
        return F.normalize(embedded.float(), dim=-1)


def _write_graph(module: nn.Module, example: Tensor, file: Path, name: str) -> None:
    """With any number of pictures or texts; the weights lie inside up to the format's 2 GB, else beside."""
    # With gradient pictures go through at once; without, in parts whose number depends on theirs.
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[name],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(file))


def _run_graph(file: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    # One by one: that any number may come in is a part of what is promised.
    rows = [session.run(None, {session.get_inputs()[0].name: row[None].numpy()})[0] for row in x]
    return torch.cat([torch.from_numpy(row) for row in rows])


def _refuse_projections(model: DualEncoder, to: str) -> None:
    if found := sorted({"image", "text"} & set(model.heads)):
        raise UserError(f"--to {to}: it has no place for the projection behind the {found[0]} tower; use --to onnx")


def _pictures(model: DualEncoder) -> UInt8[Tensor, "2 3 s s"]:
    side = model.preprocess.size
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _tokens(model: DualEncoder) -> Tensor:
    """What the text tower reads of TEXTS: tokens as long as the context, or features."""
    if model.reads_features:
        width: Any = model.text_tower.features
        return torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenizer(TEXTS)
    return F.pad(tokens, (0, model.tokenizer.context_length - tokens.shape[1]))


def _column(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def _embedded(model: DualEncoder) -> Embedded:
    texts = _tokens(model)
    encode = model.encode_features if model.reads_features else model.encode_text
    return Embedded(model.encode_image(_pictures(model)), encode(texts))


def _compare(found: Embedded, wanted: Embedded, to: str) -> None:
    apart = max(float((a - b).abs().max()) for a, b in zip(found, wanted))
    if not apart <= TOLERANCE:
        raise RuntimeError(
            f"--to {to}: what was written embeds otherwise than the model, by {apart:.2g}; nothing is kept"
        )
