"""Inputs of the objective's tests: the golden tables of the specification, and random ones with ragged negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.model.embeddings import Embeddings

EVERY_TERM: dict[str, dict[str, Any]] = {
    "infonce": {},
    "infonce own": {"negatives": "own"},
    "infonce none": {"negatives": "none"},
    "infonce with same-group": {"mask_same_group": False},
    "igc": {},
    "tgc": {"scale": 7.0},
    "distill": {"reference_batch": 16},
    "siglip": {},
    "siglip own": {"negatives": "own"},
    "siglip all": {"negatives": "all", "mask_same_group": False},
}


def named(case: str) -> str:
    """The term of a case."""
    return case.partition(" ")[0]


def table(a: float, n: int, d: int = 8) -> Tensor:
    return normalize(torch.sin(a * torch.arange(1, n * d + 1, dtype=torch.float64)).reshape(n, d), dim=1)


def golden(dtype: torch.dtype = torch.float64) -> Embeddings:
    """B=4, K=2, d=8, scale 10, negatives sample-major, and a teacher nearby."""
    v = table(1.0, 4)
    t = normalize(v + 1.5 * table(1.7, 4), dim=1)
    n = normalize(t.repeat_interleave(2, 0) + 0.6 * table(2.3, 8), dim=1)
    v_star = normalize(v + 0.2 * table(0.7, 4), dim=1)
    t_star = normalize(t + 0.2 * table(0.9, 4), dim=1)
    n_star = normalize(n + 0.2 * table(1.1, 8), dim=1)
    teacher = Embeddings(v_star.to(dtype), t_star.to(dtype), n_star.reshape(4, 2, 8).to(dtype))
    return Embeddings(
        v.to(dtype), t.to(dtype), n.reshape(4, 2, 8).to(dtype), scale=torch.tensor(10.0, dtype=dtype), teacher=teacher
    )


def unit(generator: torch.Generator, *shape: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def ragged(n: int = 8, k: int = 3, d: int = 6, seed: int = 0) -> Embeddings:
    """Random fp64 tables; pairs have 0 to k valid negatives (at least two have none), and two share a picture."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(n, k, generator=g) < torch.arange(n)[:, None] % 4 / 3
    group = torch.arange(n)
    group[n // 2] = group[0]
    return Embeddings(
        image=unit(g, n, d),
        text=unit(g, n, d),
        negative_text=unit(g, n, k, d),
        valid=valid,
        id=torch.arange(n),
        group=group,
        scale=torch.tensor([9.0], dtype=torch.float64),
        bias=torch.tensor([-3.0], dtype=torch.float64),
        teacher=Embeddings(unit(g, n, d), unit(g, n, d), unit(g, n, k, d)),
    )


def leaves(z: Embeddings, *, teacher: bool = False) -> list[Tensor]:
    """Make every table (and scale and bias) a leaf with gradient; returns them. With `teacher`, the teacher's too."""
    tables = [z.image, z.text, z.negative_text, z.scale, z.bias]
    if teacher and z.teacher:
        tables += [z.teacher.image, z.teacher.text, z.teacher.negative_text]
    return [x.requires_grad_() for x in tables if isinstance(x, Tensor)]
