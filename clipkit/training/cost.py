"""What encoding costs, found by encoding with tensors that have shapes but no values: parameters, FLOPs, bytes.

Nothing is computed and no weight is read: a model of any size is looked at in seconds, on any machine. FLOPs are
torch's own count (two a multiply-add) of a forward and a backward pass; bytes are those of what autograd keeps from one
to the other, which is linear in the number of rows. Axes: r rows (pictures or texts), t tokens, d embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from clipkit.errors import UserError
from clipkit.model.heads import build_heads
from clipkit.model.names import resolve
from clipkit.model.recompute import recompute_blocks
from clipkit.model.spec import (
    Spec,
    custom_spec,
    find_checkpoint,
    heads_spec,
    open_clip_spec,
    read_model_json,
    text_spec,
)
from clipkit.model.towers import blocks, build_towers
from clipkit.settings import ModelConfig

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast computes in, by `engine.precision`."""
ROWS = (2, 4)
"""Numbers of rows that are encoded: two, for a line through them."""
Encode = Callable[[Tensor], Tensor]
Reader = Callable[[int], Tensor]


class Encoders(NamedTuple):
    """The towers and heads of a dual encoder, without values."""

    spec: Spec
    image: nn.Module
    image_head: nn.Module
    text: nn.Module
    heads: nn.ModuleDict

    @property
    def size(self) -> int:
        """Pixels a side of its pictures."""
        image = self.spec["image"]
        size = image["cfg"].get("image_size", 224) if image["kind"] == "open_clip" else image["size"]
        return size if isinstance(size, int) else size[0]

    @property
    def context(self) -> int:
        """Tokens of its longest texts."""
        return self.spec["text"].get("context_length", 77)


@dataclass(frozen=True)
class Cost:
    """Of one row: a picture or a text."""

    forward: float
    """FLOPs."""
    backward: float
    attack: float
    """FLOPs of a backward pass to the pixels alone; 0 for texts."""
    saved: float
    """Bytes that autograd keeps for the backward pass."""
    working: float
    """Bytes that the largest single operation reads and writes."""
    casts: float
    """Bytes of weights in lower precision that are kept, once, whatever the number of rows."""
    block: float = 0.0
    """Bytes that the largest block keeps while it is computed again, where blocks are (`checkpoint_activations`)."""


def spec_of(model: ModelConfig) -> tuple[Spec, int]:
    """The spec of a config's model and its number of scalars; no weights are read. Raises UserError as `build` does."""
    if not model.name:
        return custom_spec(model) | heads_spec(model.heads), 1 + (model.bias is not None)
    spec, scalars = _named(model.name)
    if model.text.features:
        spec = {**spec, "text": text_spec(model.text)}
    return spec | heads_spec(model.heads), 2 if model.bias is not None else scalars


def spec_at(reference: str) -> tuple[Spec, int]:
    """The same of a run, a checkpoint or an open_clip name. Raises UserError for any other reference."""
    if folder := find_checkpoint(reference):
        about = read_model_json(folder)
        return about["spec"], 1 + about["bias"]
    return _named(reference)


def _named(name: str) -> tuple[Spec, int]:
    architecture, _, quick_gelu = resolve(name)
    cfg: Any = open_clip.get_model_config(architecture)
    return open_clip_spec(cfg, quick_gelu=quick_gelu), 1 + (cfg.get("init_logit_bias") is not None)


@contextmanager
def shapes_only(device: str) -> Iterator[None]:
    """Tensors made inside are on `device`, which need not exist, and hold nothing."""
    with FakeTensorMode(), torch.device(device):
        yield


def encoders(spec: Spec, *, lock_image: bool = False, lock_text: bool = False) -> Encoders:
    """What `spec` describes, in training mode, under `shapes_only`. Own dropouts, which draw real numbers, are off.

    Raises UserError where a tower's library cannot build it.
    """
    image = spec["image"] | ({"dropout": 0.0} if "dropout" in spec["image"] else {})
    try:
        towers = build_towers(spec | {"image": image, "dropout": 0.0})
    except OSError as error:
        raise UserError(f"model: its text tower could not be described: {error}") from error
    heads = build_heads(spec, towers.image_head)
    for tower, locked in ((towers.image, lock_image), (towers.text, lock_text)):
        tower.train(not locked).requires_grad_(not locked)
    return Encoders(spec, *towers, heads)


def pictures(model: Encoders) -> Encode:
    """From normalised pixels [r 3 h w] to embeddings [r d], behind them what other heads make, as in `DualEncoder`."""

    def encode(pixels: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(model.image)):
            features = model.image(pixels.contiguous(memory_format=torch.channels_last))
        embedded = model.image_head(features)
        embedded = model.heads["image"](embedded) if "image" in model.heads else embedded
        unit = F.normalize(embedded.float(), dim=-1)
        found = [unit]
        if "aspects" in model.heads:
            found.append(model.heads["aspects"](unit, "image").flatten(1))
        if "tags" in model.heads:
            read = unit if model.spec["heads"]["tags"]["on"] == "embedding" else features
            found.append(model.heads["tags"](read).float())
        return torch.cat(found, 1)

    return encode


def texts(model: Encoders) -> Encode:
    """From tokens [r t], or stored features, to embeddings [r d]."""

    def encode(read: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(model.text)):
            features = model.text(read)
        features = model.heads["text"](features) if "text" in model.heads else features
        unit = F.normalize(features.float(), dim=-1)
        if "aspects" not in model.heads:
            return unit
        return torch.cat([unit, model.heads["aspects"](unit, "text").flatten(1)], 1)

    return encode


def measure(
    spec: Spec,
    precision: str = "fp32",
    *,
    locks: tuple[bool, bool] = (False, False),
    recompute: bool = False,
    device: str | None = None,
) -> dict[str, Cost]:
    """The cost of a picture (`image`) and of a text (`text`), with those `locks` on the towers.

    Texts are as long as the context allows. Memory is that on `device`: of a GPU, where this torch knows of GPUs.
    `recompute`: learning towers keep what enters their blocks. Raises UserError for towers that cannot.
    """
    device, dtype = device or ("cuda" if torch.backends.cuda.is_built() else "cpu"), AUTOCAST[precision]
    with sdpa_kernel(SDPBackend.MATH):  # whose products are counted; which other one a CPU takes depends on the CPU
        flops = _with_shapes(spec, locks, "cpu", _flops, recompute)
    with _fused_attention() if device == "cuda" else nullcontext():
        saved = _with_shapes(spec, locks, device, partial(_bytes, dtype=dtype), recompute)
        again = _with_shapes(spec, locks, device, partial(_block_bytes, dtype=dtype), False) if recompute else {}
    found = {name: Cost(*flops[name], *saved[name]) for name in flops}
    for name, (block, casts) in again.items():
        found[name] = replace(found[name], block=block, casts=found[name].casts + casts)
    return found


def _with_shapes(
    spec: Spec,
    locks: tuple[bool, bool],
    device: str,
    look: Callable[[nn.Module, Encode, Reader], tuple[float, ...]],
    recompute: bool,
) -> dict[str, tuple[float, ...]]:
    with shapes_only(device):
        model = encoders(spec, lock_image=locks[0], lock_text=locks[1])
        for tower, locked in zip((model.image, model.text), locks):
            if recompute and not locked:
                recompute_blocks(tower)
        whole = nn.ModuleList([model.image, model.image_head, model.text, model.heads])

        def tokens(rows: int) -> Tensor:
            if width := spec["text"].get("features"):
                return torch.empty(rows, width)
            return torch.zeros(rows, model.context, dtype=torch.long)

        def pixels(rows: int) -> Tensor:
            return torch.empty(rows, 3, model.size, model.size)

        return {
            "image": look(whole, pictures(model), pixels),
            "text": look(whole, texts(model), tokens),
        }


def _flops(model: nn.Module, encode: Encode, read: Reader) -> tuple[float, ...]:
    """FLOPs a row: forward, backward, and of a backward pass to pixels alone."""
    rows = ROWS[0]
    with FlopCounterMode(display=False) as forward:
        out = encode(read(rows))
    with FlopCounterMode(display=False) as backward:
        if out.requires_grad:
            out.sum().backward()
    attack = FlopCounterMode(display=False)
    pixels = read(rows)
    if out.requires_grad and pixels.is_floating_point():
        out = encode(pixels.requires_grad_())
        with attack:
            torch.autograd.grad(out.sum(), pixels, allow_unused=True)
    return tuple(counter.get_total_flops() / rows for counter in (forward, backward, attack))


def _bytes(model: nn.Module, encode: Encode, read: Reader, *, dtype: torch.dtype | None) -> tuple[float, ...]:
    """Bytes a row that are saved and that the largest operation touches; bytes saved whatever the number of rows."""
    found = []
    for rows in ROWS:
        with _autocast(read(1).device.type, dtype), _Largest() as largest:
            found.append((saved_bytes(lambda rows=rows: encode(read(rows)), model), largest.bytes))
    (few, small), (many, large) = found
    saved, working = ((b - a) / (ROWS[1] - ROWS[0]) for a, b in ((few, many), (small, large)))
    return saved, working, few - saved * ROWS[0]


def _block_bytes(model: nn.Module, encode: Encode, read: Reader, *, dtype: torch.dtype | None) -> tuple[float, ...]:
    """Bytes a row that the block keeps which keeps most; bytes that it keeps whatever the number of rows."""
    few, many = (_largest_block(model, encode, read(rows), dtype) for rows in ROWS)
    each = (many - few) / (ROWS[1] - ROWS[0])
    return each, few - each * ROWS[0]


def _largest_block(model: nn.Module, encode: Encode, rows: Tensor, dtype: torch.dtype | None) -> int:
    sizes = [0]
    with _autocast(rows.device.type, dtype), _keeping(model) as kept:

        def enter(*_: Any) -> None:
            sizes.append(-_total(kept))

        def leave(*_: Any) -> None:
            sizes[-1] += _total(kept)

        for block in blocks(model):
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave)
        encode(rows)
    return max(sizes)


def saved_bytes(call: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps when `call` is made, each memory once, without what the model holds anyway."""
    with _keeping(model) as kept:
        result = call()
        total = _total(kept)
    del result
    return total


Memories = dict[int, torch.UntypedStorage]


def _total(kept: Memories) -> int:
    return sum(memory.nbytes() for memory in kept.values())


@contextmanager
def _keeping(model: nn.Module) -> Iterator[Memories]:
    """What autograd keeps of whatever is called inside, by memory, without what the model holds anyway."""
    own = {x.untyped_storage()._cdata for x in chain(model.parameters(), model.buffers())}
    kept: Memories = {}

    def pack(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory._cdata not in own:
            kept[memory._cdata] = memory  # held, so that its address is not given away again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


class _Largest(TorchDispatchMode):
    """Notes the most bytes that one operation reads and writes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves((args, out)) if _loose(x)}
        self.bytes = max(self.bytes, sum(memory.nbytes() for memory in held.values()))
        return out


def _loose(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, nn.Parameter)


class _Fused(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output and a number a row. Nothing is computed."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


@contextmanager
def _fused_attention() -> Iterator[None]:
    # Without a GPU torch would take the plain attention, which keeps a matrix; GPUs take one of the fused kernels.
    plain = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
        return _Fused.apply(query, key, value)  # type: ignore[return-value]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@contextmanager
def _autocast(device: str, dtype: torch.dtype | None) -> Iterator[None]:
    # torch.autocast refuses devices that are not there.
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype is not None)
    torch.set_autocast_dtype(device, dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
