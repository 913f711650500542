"""The dual encoder: `Batch` → `Embeddings`.

Axes: n pairs, k negatives, t tokens, c h w pixels, s the tower's side, f trunk features, v words, d embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipkit.checks import ROLES
from clipkit.data.batch import Batch
from clipkit.data.decode import Preprocess, decode, fit, to_pixels
from clipkit.data.members import Unreadable
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.model.adapter import FeatureAdapter
from clipkit.model.embeddings import Embeddings
from clipkit.model.heads import build_heads
from clipkit.model.local import local_logits
from clipkit.model.names import Parts, from_open_clip
from clipkit.model.preprocess import own_preprocess
from clipkit.model.recompute import recompute_blocks
from clipkit.model.spec import custom_spec, heads_spec, text_spec
from clipkit.model.tokens import check_tokens, spoken, with_patches, with_words
from clipkit.model.towers import (
    DroppedEmbedding,
    RootHead,
    TimmTower,
    adapter,
    build_towers,
    load_timm_weights,
    trims_exactly,
)
from clipkit.model.weights import weights_into
from clipkit.settings import ModelConfig

TEXTS = ("text", "positive_text", "negative_text")
"""The roles that the text tower encodes."""
BUCKETS = 4
"""Parts of like length that a call's texts are encoded in, if each holds enough of them."""
BUCKET_TEXTS, BUCKET_WORK = 128, 2**16
"""How many are enough; on CPUs, where less fills a product, texts × width × layers. Each part costs a gradient of
the whole token embedding, which small towers do not earn back (docs/log.md)."""
TEXTS_AT_ONCE = 2048
"""Texts that `embed_texts` is best given at once: it sorts them by length and encodes them in smaller batches."""
CPU_PIXELS = 2**19
"""Pixels encoded at once without gradient on a CPU: the activations of more do not fit its caches (docs/log.md)."""


class DualEncoder(nn.Module):
    """Two towers, a learned scale and, for sigmoid losses, a learned bias.

    `image_tower` gives the trunk's features [n f], `image_head` maps them to [n d] (nothing for towers that project
    themselves), `text_tower` gives [n d]. Embeddings leave in float32 at unit length, whatever the weights' type.
    A locked tower stays in eval mode (its BatchNorm never moves) and out of the graph; a head always learns. `heads`
    hold what the config adds: projections behind the towers, a classifier of tags, further projections.
    `spec`, `activation`, `tokenizer` and `preprocess` are all it takes to rebuild it: see `clipkit.model.load`.
    """

    def __init__(self, parts: Parts, *, scale_max: float = 100.0):
        super().__init__()
        self.spec, self.tokenizer, self.preprocess = parts.spec, parts.tokenizer, parts.preprocess
        self.scale_max = scale_max
        self.image_tower, self.image_head, self.text_tower = parts.towers
        self.heads = build_heads(parts.spec, self.image_head)
        # Shape [1], never a scalar, which DeepSpeed cannot broadcast.
        self.log_scale = nn.Parameter(torch.tensor([math.log(parts.scale)]))
        self.bias = None if parts.bias is None else nn.Parameter(torch.tensor([float(parts.bias)]))
        self.image_locked = self.text_locked = False
        self.local = self.recomputes = False

    @property
    def texts_at_once(self) -> int:
        """How many texts the caller of `embed_texts` does well to collect."""
        return TEXTS_AT_ONCE

    @property
    def activation(self) -> str:
        """`gelu` or `quickgelu`: what the transformer blocks compute, and what their weights were trained with."""
        return self.spec["activation"]

    @property
    def tag_words(self) -> list[str]:
        """The words that the tag head has a logit for, in their order; empty without one."""
        return self.spec["heads"]["tags"]["words"] if "tags" in self.heads else []

    @property
    def scale(self) -> Float[Tensor, "1"]:
        """The multiplicative logit scale, at most `scale_max`."""
        log_scale: Any = _ClampAbove.apply(self.log_scale.float(), math.log(self.scale_max))
        return log_scale.exp()

    def lock(self, *, image: bool = False, text: bool = False) -> DualEncoder:
        """Freeze towers for good (LiT, arXiv 2111.07991): no gradient, eval mode whatever `train()` says."""
        self.image_locked, self.text_locked = image, text
        for tower in self.locked_towers():
            tower.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> DualEncoder:
        """Set the mode of all but the locked towers."""
        super().train(mode)
        for tower in self.locked_towers():
            tower.eval()
        return self

    def locked_towers(self) -> list[nn.Module]:
        """The towers that never change."""
        image = [self.image_tower] if self.image_locked else []
        return image + ([self.text_tower] if self.text_locked else [])

    def compare_locally(self) -> None:
        """From now on `forward` also compares each picture's patches with the words of its own caption and negatives.

        Raises UserError for towers that do not give them.
        """
        check_tokens(self.image_tower, self.text_tower)
        self.local = True

    def recompute(self) -> None:
        """From now on towers that learn keep only what enters their blocks, and compute the rest again going back.

        Raises UserError for towers that cannot, or not rightly.
        """
        for tower, locked in ((self.image_tower, self.image_locked), (self.text_tower, self.text_locked)):
            if not locked:
                recompute_blocks(tower)
        self.recomputes = True

    def forward(self, batch: Batch, roles: Collection[str] = (*ROLES, "view_image")) -> Embeddings:
        """Every role of this rank's batch, encoded: all pictures in one call of their tower, and all texts in one.

        With `roles`, only those: a teacher may leave out even image or text.
        """
        pictures, texts = self._encode_pictures(batch, roles), self._encode_texts(batch, roles)
        found: dict[str, Any] = {"image": None, "text": None} | pictures | texts
        if self.local:
            found |= {role: F.normalize(words[..., 0, :].float(), dim=-1) for role, words in texts.items()}
            found |= self._compare(found.pop("patches"), texts, batch)
        if "aspects" in self.heads:
            towers = [tower for tower in ("image", "text") if found[tower] is not None]
            found |= {f"{tower}_aspects": self.heads["aspects"](found[tower], tower) for tower in towers}
        return Embeddings(
            **found,
            valid=batch.valid,
            positive_valid=batch.positive_valid,
            negative_image_valid=batch.negative_image_valid,
            negative_kind=batch.negative_kind,
            negative_weight=batch.negative_weight,
            relevance=batch.relevance,
            tags=batch.tags,
            label=batch.label,
            id=batch.id,
            group=batch.group,
            scale=self.scale,
            bias=None if self.bias is None else self.bias.clone(),  # the parameter may leave with its engine
        )

    def _encode_pictures(self, batch: Batch, roles: Collection[str]) -> dict[str, Tensor]:
        """The embeddings [... d] of every role of picture, in one call of the tower, and what heads make of the pairs'.

        These are `tag_logits` [n w] and, if local, `patches` [n p d].
        """
        if "image" not in roles:
            return {}
        n, further = len(batch), [role for role in ("negative_image", "view_image") if role in roles]
        tables: dict[str, Tensor] = {role: table for role in further if (table := getattr(batch, role)) is not None}
        more, stored = [table.flatten(0, 1) for table in tables.values()], batch.image_features
        found = {}
        if self.local:  # a store holds no patches
            features = self._features(_joined([batch.image, *more]), partial(with_patches, self.image_tower))
            found["patches"] = self._to_embedding(features[:n, 1:])
            features = features[:, 0]
        elif stored is None:
            features = self.image_features(_joined([batch.image, *more]))
        else:
            features = _joined([stored, *([self.image_features(_joined(more))] if more else [])])
        counts = [table.shape[1] for table in tables.values()]
        embedded = self._project(features, _dropout_keys(batch.id, counts))
        image, *parts = embedded.split([n, *(n * count for count in counts)])
        if "tags" in self.heads:
            found["tag_logits"] = self._tag_logits(features[:n], image)
        return {"image": image, **{r: x.unflatten(0, (n, c)) for r, x, c in zip(tables, parts, counts)}, **found}

    def _encode_texts(self, batch: Batch, roles: Collection[str]) -> dict[str, Tensor]:
        """The embeddings [... d] of every role of text that the batch holds, in one call of the tower.

        If local, as the tower gives them and with each text's words behind [... 1+t d].
        """
        held = {role: getattr(batch, self._field(role)) for role in TEXTS if role in roles}
        tables: dict[str, Tensor] = {role: table for role, table in held.items() if table is not None}
        if not tables:
            return {}
        longest = max(table.shape[-1] for table in tables.values())
        padded = [F.pad(table, (0, longest - table.shape[-1])).flatten(0, -2) for table in tables.values()]
        encode = self._with_words if self.local else self.encode_features if self.reads_features else self.encode_text
        encoded = encode(torch.cat(padded)).split([len(rows) for rows in padded])
        return {role: rows.unflatten(0, tables[role].shape[:-1]) for role, rows in zip(tables, encoded)}

    def _compare(self, patches: Float[Tensor, "n p d"], texts: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Of each picture with its caption [n] and its negatives [n k], from words [... 1+t d]."""
        found = {}
        for role, name in (("text", "local_logit"), ("negative_text", "negative_local_logit")):
            if role in texts:
                words, tokens = texts[role][..., 1:, :], getattr(batch, role)
                there = spoken(self.text_tower, F.pad(tokens, (0, words.shape[-2] - tokens.shape[-1])))
                found[name] = local_logits(patches, words, there, self.scale)
        return found

    def with_image_features(self, batch: Batch) -> Batch:
        """The batch with the locked trunk's outputs in place: student and teacher then share one pass through it."""
        assert self.image_locked, "the features of a learning tower belong to its own forward"
        if batch.image_features is not None:
            return batch
        return replace(batch, image_features=self.image_features(batch.image))

    def image_features(self, image: UInt8[Tensor, "n c h w"] | None) -> Float[Tensor, "n f"]:
        """The trunk's output; without gradient when it is locked. Pixels are normalised here, on their device."""
        return self._features(_joined([image]), self.image_tower)

    def _features(self, image: UInt8[Tensor, "n c h w"], encode: Callable[[Tensor], Tensor]) -> Tensor:
        mean, std = _pixel_statistics(self.preprocess, image.device)
        pixels = ((image.float() - mean) / std).to(_dtype(self.image_tower))
        # Convolutions run up to twice as fast with the channels innermost; transformers do not mind.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.image_locked):
            if image.device.type != "cpu" or torch.is_grad_enabled():
                return encode(pixels)
            at_once = max(1, CPU_PIXELS // pixels[0, 0].numel()) if len(pixels) else 1
            return torch.cat([encode(some) for some in pixels.split(at_once)])

    def encode_image(self, image: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Unit-length embeddings of preprocessed pictures."""
        return self._project(self.image_features(image))

    def _project(self, features: Float[Tensor, "n f"], id: Int64[Tensor, " n"] | None = None) -> Float[Tensor, "n d"]:
        return F.normalize(self._to_embedding(features, id).float(), dim=-1)

    def _to_embedding(
        self, features: Float[Tensor, "*n f"], id: Int64[Tensor, " n"] | None = None
    ) -> Float[Tensor, "*n d"]:
        if isinstance(self.image_head, RootHead):
            features = self.image_head(features.to(_dtype(self.image_head)), id)
        elif not isinstance(self.image_head, nn.Identity):
            features = self.image_head(features.to(_dtype(self.image_head)))
        return self._head("image", features)

    def _tag_logits(self, features: Float[Tensor, "n f"], embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n w"]:
        read = embedding if self.spec["heads"]["tags"]["on"] == "embedding" else features
        return self._head("tags", read).float()

    def _head(self, name: str, x: Tensor) -> Tensor:
        """`x` through the head called so; as it is where there is none."""
        return self.heads[name](x.to(_dtype(self.heads[name]))) if name in self.heads else x

    def encode_text(self, tokens: Int64[Tensor, "n t"]) -> Float[Tensor, "n d"]:
        """Unit-length embeddings of texts, cut to any common length where the tower allows it (`tokenizer.trim`)."""
        return F.normalize(self._texts(tokens, self.text_tower).float(), dim=-1)

    def _with_words(self, tokens: Int64[Tensor, "n t"]) -> Float[Tensor, "n 1+t d"]:
        """As the tower gives them: texts, and behind each its words."""
        places = tokens.shape[1]

        def encode(some: Tensor) -> Tensor:
            return F.pad(with_words(self.text_tower, some), (0, 0, 0, places - some.shape[1]))

        return self._texts(tokens, encode)

    def _texts(self, tokens: Int64[Tensor, "n t"], encode: Callable[[Tensor], Tensor]) -> Tensor:
        full = self.tokenizer.context_length
        assert self.tokenizer.trim or tokens.shape[1] == full, f"this text tower needs all {full} positions"
        # What is computed again going back is so outside of this context: attention has to be the same without.
        attention = nullcontext() if self.recomputes else _attention(tokens.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.text_locked), attention:
            features = self._by_length(tokens, encode) if self.tokenizer.trim else encode(tokens)
        return self._head("text", features)

    @property
    def reads_features(self) -> bool:
        """Whether texts come as stored features, not as tokens."""
        return isinstance(self.text_tower, FeatureAdapter)

    def _field(self, role: str) -> str:
        """Where a batch holds what the text tower reads."""
        return f"{role}_features" if self.reads_features else role

    def encode_features(self, features: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        """Unit-length embeddings of texts from their stored features, whose length does not matter.

        Raises UserError when they are not of the width that the tower was made for.
        """
        if features.shape[1] != self.text_tower.features:
            raise UserError(
                f"model.text.features: {self.text_tower.features}, but the stored features are {features.shape[1]} wide"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.text_locked):
            embedded = self.text_tower(F.normalize(features.float(), dim=-1).to(_dtype(self.text_tower)))
        return F.normalize(embedded.float(), dim=-1)

    @cached_property
    def _embedder(self) -> DualEncoder:
        """The model that makes features of new texts; not a part of this one."""
        from clipkit.model.load import load  # builds on this module

        if not (name := self.spec["text"]["embedder"]):
            raise UserError(
                "this model reads stored features of texts, not texts (model.text.features); to embed new texts, train "
                "it with model.text.embedder: the model that the features come from"
            )
        return load(name, self.log_scale.device)

    def _texts_a_part(self, device: torch.device) -> int:
        if device.type != "cpu":
            return BUCKET_TEXTS
        work = self.spec["text"].get("width", 512) * self.spec["text"].get("layers", 12)  # open_clip's defaults
        return min(BUCKET_TEXTS, BUCKET_WORK // work)

    def _by_length(self, tokens: Int64[Tensor, "n t"], encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Texts of like length at a time: the same values, without most of the padding."""
        lengths = _lengths(tokens)
        order = lengths.argsort(stable=True)
        parts = order.chunk(BUCKETS if len(order) >= self._texts_a_part(tokens.device) * BUCKETS else 1)
        words = getattr(self.text_tower, "token_embedding", None)
        with words.one_draw() if isinstance(words, DroppedEmbedding) else nullcontext():
            features = [encode(tokens[part, : max(1, int(lengths[part[-1]]))]) for part in parts]
        return torch.cat(features)[order.argsort()]

    def embed_images(self, images: Sequence[Any] | np.ndarray, batch_size: int = 64) -> Float[Tensor, "n d"]:
        """Embed pictures: PIL images, paths, or uint8 arrays (h w 3), in a list or as one array (n h w 3).

        Returns float32 on the CPU, unit length. Raises UserError for a picture that cannot be read.
        """
        return self._embed(images, batch_size, lambda some: self.encode_image(self._pixels(some)))

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Float[Tensor, "n d"]:
        """Embed texts. Returns float32 on the CPU, unit length, in the order given.

        Raises UserError where texts come as stored features and `model.text.embedder` names nothing to make them with.
        """
        if self.reads_features:
            features = self._embedder.embed_texts(texts, batch_size).to(self.log_scale.device)
            return self._embed(features, batch_size, self.encode_features)
        # Texts of as many tokens go together, so that hardly any carries padding.
        tokens = self.tokenizer(list(texts)).to(self.log_scale.device)
        order = _lengths(tokens).argsort(stable=True)
        embedded = self._embed(tokens[order], batch_size, self.encode_text)
        return torch.empty_like(embedded).index_copy_(0, order.cpu(), embedded)

    def _embed(self, items: Any, size: int, encode: Callable[[Any], Tensor]) -> Float[Tensor, "n d"]:
        """`encode` over the items, `size` at a time, in eval mode without gradient; the mode is restored."""
        training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                parts = [encode(items[i : i + size]).cpu() for i in range(0, len(items), size)]
        finally:
            self.train(training)
        # Joined outside of inference mode, so that what is returned is an ordinary tensor.
        return torch.cat([torch.empty(0, self.spec["embed_dim"]), *parts])

    def _pixels(self, images: Sequence[Any]) -> UInt8[Tensor, "n c h w"]:
        return torch.stack([load_pixels(image, self.preprocess) for image in images]).to(self.log_scale.device)


def build(config: ModelConfig) -> DualEncoder:
    """The dual encoder of `config`, with the weights it starts from.

    Raises UserError for names, settings and weights that do not exist or do not belong together.
    """
    parts = _from_name(config) if config.name else _from_settings(config)
    parts = parts._replace(spec=parts.spec | heads_spec(config.heads))
    if config.bias is not None:
        parts = parts._replace(bias=config.bias)
    model = DualEncoder(parts, scale_max=config.scale_max)
    if config.start:
        weights_into(model, config.start)
    with torch.no_grad():
        if config.scale is not None:
            model.log_scale.fill_(math.log(config.scale))
        if model.bias is not None and config.bias is not None:
            model.bias.fill_(config.bias)
    return model.lock(image=config.lock_image, text=config.lock_text)


def _from_name(config: ModelConfig) -> Parts:
    parts = from_open_clip(config.name)
    if not config.text.features:
        return parts
    spec = {**parts.spec, "text": text_spec(config.text)}
    return parts._replace(spec=spec, towers=parts.towers._replace(text=adapter(spec["text"], spec["embed_dim"])))


def _from_settings(config: ModelConfig) -> Parts:
    image, spec = config.image, custom_spec(config)
    if config.lock_image and image.timm and image.pool == "attention" and not config.start:
        raise UserError(
            "model.lock_image: locks an attention pooling that has never learned; use model.image.pool: avg"
        )
    towers = build_towers(spec)
    if image.weights and isinstance(towers.image, TimmTower):
        load_timm_weights(towers.image, image)
    tokenizer = Tokenizer(
        "clip", config.text.context_length, trim=bool(config.text.features) or trims_exactly(towers.text)
    )
    return Parts(spec, towers, tokenizer, own_preprocess(image))


def load_pixels(image: Any, preprocess: Preprocess) -> UInt8[Tensor, "3 s s"]:
    """A PIL image, a path or a uint8 array (h w 3) at the tower's size. Raises UserError when it cannot be read."""
    if isinstance(image, Image.Image):
        return fit(to_pixels(image.convert("RGB")), preprocess)
    if isinstance(image, str | Path):
        try:
            return decode(Path(image).read_bytes(), preprocess)
        except (OSError, Unreadable) as error:
            raise UserError(f"{image}: {error}") from error
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"a picture should be a uint8 array (h w 3), found {array.dtype} {array.shape}")
    return fit(torch.tensor(array).permute(2, 0, 1), preprocess)


def _lengths(tokens: Int64[Tensor, "n t"]) -> Int64[Tensor, " n"]:
    # Not the number of tokens other than 0: CLIP's token 0 is a real one, a "!" inside a word.
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return ((tokens != 0) * places).amax(1)


def _dropout_keys(id: Int64[Tensor, " n"], counts: list[int]) -> Int64[Tensor, " m"]:
    """What the head's dropout is keyed by: the pairs' ids, then a number of its own for each of their other ones."""
    keys, first = [id], 0
    for count in counts:
        place = torch.arange(first, first + count, device=id.device)
        keys.append(-2 - (id[:, None] * sum(counts) + place).flatten())
        first += count
    return torch.cat(keys)


def _joined(tables: list[Any]) -> Tensor:
    assert all(table is not None for table in tables), "the batch holds neither pictures nor features"
    return tables[0] if len(tables) == 1 else torch.cat(tables)


@lru_cache
def _pixel_statistics(preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of 0…255 pixels, [3 1 1] in float32; as buffers, engines would round them to bf16."""
    with torch.inference_mode(False):
        mean, std = (
            torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (preprocess.mean, preprocess.std)
        )
    return mean, std


def _attention(device: torch.device) -> AbstractContextManager[Any]:
    """Plain attention for texts that learn on CPUs: torch's fused kernel is slow there in bf16 (perf/attention.py)."""
    if device.type == "cpu" and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class _ClampAbove(torch.autograd.Function):
    """min(x, most), whose gradient is stopped only where a step would go further beyond the bound.

    An ordinary clamp has no gradient above the bound and so never lets the parameter come back; editing the parameter
    after the step does nothing under sharded engines.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward(x >= most)  # not x: engines that divide the model take it away until the next forward
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (above,), (grad,) = ctx.saved_tensors, grads
        return grad.masked_fill(above & (grad < 0), 0.0), None
