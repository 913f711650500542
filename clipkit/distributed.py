"""Ranks, world size and gathers in one place; everything works unchanged in a single process.

`all_gather` carries gradients back with a reduce-scatter *sum*: when every rank then computes the same full loss
and the engine averages gradients over ranks, every gradient equals the one-process gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.8 has the old names only, and a later one warns of them.
_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def active() -> bool:
    """Whether a process group with more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Number of ranks, 1 when alone."""
    return dist.get_world_size() if active() else 1


def is_main() -> bool:
    """Whether this rank writes the files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        dist.barrier()


class _AllGather(torch.autograd.Function):
    # Own function: torch's differentiable gathers are deprecated one release after another.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        _gather(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        out = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        _reduce_scatter(out, grad.contiguous())
        return out


def all_gather(x: Tensor) -> Tensor:
    """`x` (b, ...) of all ranks, in rank order, as (world * b, ...), with gradient. All ranks: equal shapes."""
    if not active():
        return x
    if x.dtype == torch.bool:
        return _AllGather.apply(x.to(torch.uint8)).bool()  # type: ignore[union-attr]
    return _AllGather.apply(x)  # type: ignore[return-value]


def total(x: Tensor) -> Tensor:
    """The sum of `x`, of one shape, over all ranks, the same on every rank; no gradient."""
    if not active():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def anywhere(flags: Tensor) -> list[bool]:
    """Which of the bool `flags` (n) are up on any rank, the same list on every rank. Waits for the device."""
    if active():
        flags = flags.to(torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return flags.bool().tolist()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable `value`, in rank order, on every rank. For small things between our own ranks only."""
    if not active():
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def whole(x: Any) -> Tensor:
    """`x` in full where it is divided among ranks, which then ask together; else itself."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gathered(x: Any) -> Tensor:
    """`x` itself, or, where it is divided among ranks, all of it on the CPU; all ranks ask together."""
    return x.full_tensor().cpu() if hasattr(x, "full_tensor") else x


def part(x: Any) -> Tensor:
    """This rank's part of `x` where it is divided among ranks, else all of it; the same memory."""
    return x.to_local() if hasattr(x, "to_local") else x


def fill(x: Any, value: Tensor) -> None:
    """Copy the full `value` into `x`, which may be divided among ranks. No word is exchanged, no gradient recorded."""
    with torch.no_grad():
        if hasattr(x, "to_local") and not hasattr(value, "to_local"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(x.device), x.device_mesh, x.placements, src_data_rank=None)
        part(x).copy_(part(value))
