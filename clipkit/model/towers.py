"""Towers from a `spec` (clipkit.model.spec), without network or further files.

Axes: n pictures or texts, c h w pixels, t tokens, f trunk features, d embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
from jaxtyping import Float, Int64
from open_clip.transformer import TextTransformer
from safetensors.torch import load_file
from timm.layers.attention_pool2d import AttentionPool2d
from torch import Tensor, nn

from clipkit.errors import UserError, did_you_mean
from clipkit.model.adapter import FeatureAdapter
from clipkit.model.spec import Spec
from clipkit.settings import ImageTower

HEAD_WIDTH = 16
"""Channels a head of attention pooling: narrow heads are many, and each can look at places of its own."""

BLOCKS = ("resblocks", "blocks", "layers", "layer")
"""What towers call the lists of their blocks."""


class Towers(NamedTuple):
    """Picture → [n f] → [n d] and tokens, or stored features, → [n d]; none of them normalises."""

    image: nn.Module
    image_head: nn.Module
    text: nn.Module


def build_towers(spec: Spec) -> Towers:
    """Freshly initialised towers. Raises UserError where `cfg` cannot be built."""
    image = spec["image"]
    # A timm tower replaces this throw-away one: open_clip builds text towers only together with a vision tower.
    vision: Any = image["cfg"] if image["kind"] == "open_clip" else {"layers": 1, "width": 64, "image_size": 32}
    quick_gelu = spec["activation"] == "quickgelu"
    reads_features = "features" in spec["text"]
    words: Any = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 8} if reads_features else spec["text"]
    try:
        pair = open_clip.CustomTextCLIP(spec["embed_dim"], vision, words, quick_gelu=quick_gelu)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"open_clip cannot build image {vision} with text {spec['text']}: {error}") from error
    towers = open_clip_towers(pair)
    if spec["dropout"]:
        text: Any = towers.text
        text.token_embedding = DroppedEmbedding.like(text.token_embedding, spec["dropout"])
    if reads_features:
        towers = towers._replace(text=adapter(spec["text"], spec["embed_dim"]))
    if image["kind"] == "open_clip":
        return towers
    if image["kind"] == "conv":
        trunk = ConvTower(image["layers"], pool=image["pool"], size=image["size"])
    else:
        trunk = TimmTower(image["name"], image["cfg"], pool=image["pool"], size=image["size"])
    if image.get("head") == "root":
        head: nn.Module = RootHead(trunk.features, spec["embed_dim"], image["dropout"])
    else:
        head = nn.Linear(trunk.features, spec["embed_dim"])
    return Towers(trunk, head, towers.text)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that a model's towers are made of, by the names of the lists that hold them; none in plain stacks."""
    for name, child in model.named_modules():
        if name.rpartition(".")[2] in BLOCKS and isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (block for block in child if any(True for _ in block.parameters()))


def adapter(text: Spec, embed_dim: int) -> FeatureAdapter:
    """A fresh text tower that reads stored features."""
    return FeatureAdapter(text["features"], text["layers"], embed_dim)


def open_clip_towers(model: nn.Module) -> Towers:
    """The two towers of an open_clip model built with a separate text tower; both project to [n d] themselves."""
    image: Any = model.visual
    text: Any = model.text
    # CoCa's towers also hand out tokens for its decoder.
    image.output_tokens = text.output_tokens = False
    if isinstance(text, TextTransformer) and text.attn_mask is not None:
        text.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)
    return Towers(image, nn.Identity(), text)


def trims_exactly(text: nn.Module) -> bool:
    """Whether padding cannot reach the pooled token, so that texts may be cut to the longest of a call.

    True for causal transformers that pool at the end of the text; not for bidirectional ones, for pooling at the last
    position, and not for CoCa, whose class token sits behind the padding.
    """
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and text.cls_emb is None
        and text.pool_type in ("argmax", "eos")
    )


def _cut_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # open_clip cuts its position embedding to the text's length but hands the causal mask on uncut.
    length, mask = args[0].shape[1], kwargs["attn_mask"]
    return args, kwargs | {"attn_mask": mask[..., :length, :length]}


class TimmTower(nn.Module):
    """A timm network without its classifier: picture [n 3 size size] → features [n f].

    `cfg` holds keyword arguments of `timm.create_model`; small networks for 48–96 pixels, as found under `model.image`:

        timm: resnet18                                   # 1.2 M parameters, a 6 × 6 map of 256 channels at 96 px
        cfg: {layers: [1, 1, 1, 1], channels: [32, 64, 128, 256], output_stride: 16}
        size: 96
        pool: attention

        timm: vit_tiny_patch16_224                       # 0.9 M parameters, 64 patches at 64 px
        cfg: {img_size: 64, patch_size: 8, embed_dim: 128, depth: 4, num_heads: 4}
        size: 64

    `pool`: `avg` averages the map; `attention` is a learned query over the map with a learned position embedding
    (timm's AttentionPool2d, CLIP's own for ResNets), so that *where* things are survives.
    Raises UserError for an unknown name, a `cfg` the network does not take, or a map attention cannot pool.
    """

    def __init__(self, name: str, cfg: dict[str, Any], *, pool: str, size: int):
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"model.image.timm: no architecture called {name}{did_you_mean(name, timm.list_models())}")
        pooling = "avg" if pool == "avg" else ""
        try:
            self.trunk: Any = timm.create_model(name, pretrained=False, num_classes=0, global_pool=pooling, **cfg)
            shape = _output_shape(self.trunk, size)
        except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
            raise UserError(f"model.image: timm cannot build {name} with {cfg} at {size} pixels: {error}") from error
        self.features = shape[1]
        self.pool: nn.Module = nn.Identity() if pool == "avg" else _pool(pool, name, shape)

    def forward(self, image: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        return self.pool(self.trunk(image))


class ConvTower(nn.Module):
    """A plain stack of 3×3 convolutions, batch norms and ReLUs: picture [n 3 size size] → features [n f].

    `layers` lists (channels, stride). For small pictures with small things in them it learns in hundreds of steps what
    ResNets, whose stems reduce by four at once, do not learn in thousands (docs/log.md). `pool` as for `TimmTower`.
    """

    def __init__(self, layers: list[tuple[int, int]], *, pool: str, size: int):
        super().__init__()
        blocks: list[nn.Module] = []
        before = 3
        for channels, stride in layers:
            blocks += [nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            before = channels
        self.trunk = nn.Sequential(*blocks)
        shape = _output_shape(self.trunk, size)
        self.features = shape[1]
        self.pool = _pool(pool, "the stack of convolutions", shape)

    def forward(self, image: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        # Convolutions like this order: a tenth less time in bf16 on a CPU. The weights keep theirs, which is saved.
        return self.pool(self.trunk(image.contiguous(memory_format=torch.channels_last)))


def _output_shape(trunk: nn.Module, size: int) -> torch.Size:
    with torch.no_grad():
        shape = trunk.eval()(torch.zeros(1, 3, size, size)).shape
    trunk.train()
    return shape


def _pool(pool: str, name: str, shape: torch.Size) -> nn.Module:
    """From the map that network `name` gives, of `shape`, to one vector a picture."""
    if pool == "avg":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if len(shape) != 4:
        raise UserError(
            f"model.image.pool: attention needs a feature map (n c h w); {name} gives {list(shape)}: use avg"
        )
    channels = shape[1]
    width = next(width for width in (HEAD_WIDTH, 8, 4, 2, 1) if channels % width == 0)
    return AttentionPool(channels, feat_size=(shape[2], shape[3]), head_dim=width)


class AttentionPool(AttentionPool2d):
    """timm's (the weights are its own), asked for the one vector that comes out of it: map [n f h w] → [n f].

    timm lets every place of the map look at every other and keeps what the mean has seen. One query needs neither keys
    nor values of the places: its own way through the keys' weights weighs them, and the values' weights wait for the
    weighted sum. The keys' bias adds the same to all scores. A tenth less CPU time for the demo (docs/log.md).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Where all places are asked for (clipkit.model.tokens) timm's own way serves; on maps this small torch's fused
        # kernel wins nothing, and in bf16 it is slow on CPUs (perf/attention.py).
        self.fused_attn = False

    def forward(self, x: Float[Tensor, "n f h w"], pre_logits: bool = False) -> Float[Tensor, "n f"]:
        places = x.flatten(2).mT
        places = torch.cat([places.mean(1, keepdim=True), places], 1) + self.pos_embed  # n p f
        together: Any = self.qkv
        query, key, value = together.weight.unflatten(0, (3, self.num_heads, self.head_dim))  # heads e f
        query_bias, _, value_bias = together.bias.unflatten(0, (3, self.num_heads, self.head_dim))
        asked = torch.einsum("nf,aef->nae", places[:, 0], query) + query_bias
        asked = torch.einsum("nae,aef->naf", asked * self.scale, key)
        shares = (asked @ places.mT).softmax(-1)  # n heads p
        seen = torch.einsum("naf,aef->nae", shares @ places, value) + value_bias
        return seen.flatten(1) if pre_logits else self.proj(seen.flatten(1))


def load_timm_weights(tower: TimmTower, config: ImageTower) -> None:
    """Fill the trunk from the local safetensors file `config.weights` (any float type).

    Only the classifier may be left over, and only batch counters may be missing; anything else is a UserError.
    """
    path = Path(config.weights)
    if not path.is_file():
        raise UserError(f"model.image.weights: {path}: no such file")
    state = {key: value.float() for key, value in load_file(path).items()}
    own = tower.trunk.state_dict()
    classifier = tower.trunk.pretrained_cfg["classifier"]
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    left_over = [key for key in state if key not in own and not key.startswith(heads)]
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    for problem, keys in (("does not know", left_over), ("misses", missing), ("has another shape of", shapes)):
        if keys:
            raise UserError(
                f"model.image.weights: {path} is not for {config.timm} with {config.cfg}: "
                f"the {'network' if keys is left_over else 'file'} {problem} {keys[0]} (and {len(keys) - 1} more)"
            )
    tower.trunk.load_state_dict(state | {k: v for k, v in own.items() if k not in state}, strict=False)


class RootHead(nn.Module):
    """Signed square root, layer norm, dropout, linear: pooled features [n f] → [n d].

    Pooled activations are many small values and a few large ones, which a linear map mostly hears; their roots weigh
    evenly (power normalisation, Perronnin et al., ECCV 2010). The dropout mask is a hash of one number drawn from
    torch's CPU generator and of the samples' ids, as in `DroppedEmbedding`; calls without ids drop nothing.
    """

    def __init__(self, features: int, embed_dim: int, rate: float):
        super().__init__()
        self.norm, self.linear, self.rate = nn.LayerNorm(features), nn.Linear(features, embed_dim), rate

    def forward(self, features: Float[Tensor, "n f"], id: Int64[Tensor, " n"] | None = None) -> Float[Tensor, "n d"]:
        x = self.norm(features.sign() * features.abs().clamp(min=1e-6).sqrt())
        if self.training and self.rate and id is not None:
            kept = keep_mask(id[:, None] + 1, x.shape[1], self.rate, _salt())
            x = x * kept[:, 0] / (1 - self.rate)
        return self.linear(x)


class DroppedEmbedding(nn.Embedding):
    """A token embedding with dropout on its output while training.

    The mask is a hash of one number drawn from torch's CPU generator and of each text's own tokens, so that it does
    not depend on how the batch is cut into ranks or padded: with equal generators every split drops the same values.
    """

    rate: float
    salt: int | None = None

    @classmethod
    def like(cls, embedding: nn.Embedding, rate: float) -> DroppedEmbedding:
        """The same embedding table, with dropout."""
        out = cls(embedding.num_embeddings, embedding.embedding_dim)
        out.weight = embedding.weight
        out.rate = rate
        return out

    def forward(self, input: Int64[Tensor, "n t"]) -> Float[Tensor, "n t w"]:
        out = super().forward(input)
        if not self.training:
            return out
        salt = _salt() if self.salt is None else self.salt
        kept = keep_mask(input, out.shape[-1], self.rate, salt)
        return out * kept / (1 - self.rate)

    @contextmanager
    def one_draw(self) -> Iterator[None]:
        """In this context any number of calls drop what one call with all their texts would."""
        self.salt = _salt() if self.training else None
        try:
            yield
        finally:
            self.salt = None


def _salt() -> int:
    return int(torch.randint(2**31, ()))


def keep_mask(tokens: Int64[Tensor, "n t"], width: int, rate: float, salt: int) -> Tensor:
    """Which of n × t × width values are kept: each with probability 1 - `rate`, as a function of text and `salt`.

    Padding (token 0) adds nothing to a text's hash. The mixing is murmur3's 32-bit finaliser.
    """
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    mixed = _mix((tokens * 64 + position * 0x9E3779B1 + salt).int())
    text = (mixed * (tokens != 0)).sum(1, dtype=torch.int32)
    place = _mix(text[:, None] + (position * 0x85EBCA77).int())
    channel = _mix((torch.arange(width, device=tokens.device) * 0xC2B2AE3D + salt).int())
    noise = _mix(place[:, :, None] ^ channel)
    return noise >= int(rate * 2**32) - 2**31


def _mix(x: Tensor) -> Tensor:
    # int32 products wrap around; the masks make the arithmetic right shifts logical ones.
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387
    return x ^ ((x >> 16) & 0xFFFF)
