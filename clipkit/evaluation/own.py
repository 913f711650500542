"""Models that clipkit has no towers for, as far as evaluation needs them: pictures and texts in, embeddings out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.embed import Model

CONVERTED = "clip"
"""The transformers type that `clipkit.load` makes a dual encoder of."""


class Encoders:
    """Anything with `encode_image` and `encode_text` as a model that can be evaluated.

    `preprocess`: PIL picture -> tensor [c h w]; `tokenize`: strings -> tensor [n t]; `scale`: what similarities are
    multiplied by for probabilities (100 where nothing is said); `fingerprint`: a text that names the weights, by which
    embeddings may be kept.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Any], Any],
        tokenize: Callable[[list[str]], Any],
        *,
        device: str = "cpu",
        scale: float | None = None,
        fingerprint: str = "",
    ):
        self.model, self.preprocess, self.tokenize = model, preprocess, tokenize
        self.device, self.scale, self.fingerprint = device, scale, fingerprint

    def embed_images(self, images: list[Any]) -> Any:
        """PIL pictures -> n d."""
        import torch

        with torch.inference_mode():
            return self.model.encode_image(torch.stack([self.preprocess(one) for one in images]).to(self.device))

    def embed_texts(self, texts: list[str]) -> Any:
        """Strings -> n d."""
        import torch

        with torch.inference_mode():
            return self.model.encode_text(self.tokenize(texts).to(self.device))


class Transformers:
    """A transformers folder with `get_image_features` and `get_text_features`: SigLIP, SigLIP 2, ALIGN, AltCLIP, …"""

    def __init__(self, folder: Path):
        import torch
        from transformers import AutoModel, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UserError(f"{folder}: transformers cannot read it: {error}") from None
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise UserError(f"{folder}: {type(self.model).__name__} does not give features of pictures and of texts")
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        scale = getattr(self.model, "logit_scale", None)
        self.scale = None if scale is None else scale.detach().float().exp().reshape(())
        # SigLIP was trained on texts padded to their full length, and attends to the padding.
        self.padded = self.model.config.model_type.startswith("siglip")

    @property
    def fingerprint(self) -> str:
        """Names the weights as they lie in memory."""
        from clipkit.evaluation.store import weights_digest

        return f"{self.model.config.to_json_string()} {weights_digest(self.model.state_dict())}"

    def embed_images(self, images: list[Any]) -> Any:
        """PIL pictures -> n d."""
        return self._features(self.model.get_image_features, images=images)

    def embed_texts(self, texts: list[str]) -> Any:
        """Strings -> n d."""
        padding = "max_length" if self.padded else True
        return self._features(self.model.get_text_features, text=texts, padding=padding, truncation=True)

    def _features(self, get: Callable[..., Any], **inputs: Any) -> Any:
        import torch

        with torch.inference_mode():
            given = self.processor(**inputs, return_tensors="pt").to(self.model.device)
            if self.padded:
                given.pop("attention_mask", None)
            found = get(**given)
        return getattr(found, "pooler_output", found)


def open_model(reference: str) -> Model:
    """What `clipkit.load` takes, any transformers folder of two towers, or FILE.py:FUNCTION that returns a model.

    Raises UserError for what is none of these.
    """
    file, colon, name = reference.rpartition(":")
    if colon and file.endswith(".py"):
        return _from_python(Path(file), name)
    config = Path(reference) / "config.json"
    if config.is_file() and not (Path(reference) / "open_clip_config.json").is_file():
        try:
            kind = json.loads(config.read_text()).get("model_type", "")
        except ValueError as error:
            raise UserError(f"{config}: not a readable JSON file: {error}") from None
        if kind != CONVERTED:
            return Transformers(Path(reference))
    from clipkit.model.load import load

    return load(reference)


def _from_python(file: Path, name: str) -> Model:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if name not in functions:
        raise UserError(f"{file}: has no function {name}{did_you_mean(name, functions)}")
    model = getattr(module, name)()
    if not all(callable(getattr(model, method, None)) for method in ("embed_images", "embed_texts")):
        raise UserError(
            f"{file}:{name}: should return a model with embed_images and embed_texts (say, an Encoders of "
            f"clipkit.evaluation.own); it returned {type(model).__name__}"
        )
    return model
