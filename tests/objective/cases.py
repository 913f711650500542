"""Inputs of the objective's tests: the golden tables of the specification, and random ones with ragged negatives."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.model.embeddings import Embeddings
from clipkit.objective import TERMS, build

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
    "siglip group": {"positives": "group"},
    "infonce label": {"mask_same_label": True},
    "tcl label": {"positives": "label", "log_k1": 2.0},
    "tcl label within": {"positives": "label", "within": True, "log_k1": -inf},
    "stc": {},
    "stc sum": {"reduction": "sum"},
    "class_similarity": {},
    "class_similarity image": {"of": "image"},
    "spurious": {},
    "dcl": {},
    "dcl weighted": {"sigma": 0.5},
    "dcl within": {"within": True, "sigma": 2.0},
    "hn_nce": {},
    "hn_nce detached": {"alpha": 0.9, "beta": 0.25, "detach_weights": True},
    "hn_nce decoupled": {"alpha": 0.0, "beta": 0.3},
    "tcl": {},
    "tcl within": {"within": True, "log_k1": 2.0, "log_k2": -0.5},
    "tcl all": {"negatives": "all", "within": True, "log_k1": -inf},
    "tcl own": {"negatives": "own", "log_k1": 1.0, "log_k2": 0.5},
    "cwcl": {},
    "cwcl text": {"frozen": "text", "power": 3.0},
    "gist": {},
    "gist own": {"negatives": "own", "margin": 0.1},
    "gist all": {"negatives": "all", "margin": 0.2, "relative": True},
    "rank": {},
    "rank fixed": {"least": 4.0, "most": 4.0},
    "imc": {},
    "imc own": {"negatives": "own"},
    "fsc_global": {},
    "fsc_global plain": {"gamma": 0.0, "smoothing": 0.3},
    "fsc_local": {},
    "fsc_local plain": {"gamma": 0.0, "smoothing": 0.3},
    "tic": {},
    "tic few": {"top": 2, "cap": 0.4},
    "triplet": {},
    "macl": {},
    "macl cool": {"alpha": -0.6, "a0": 0.2},
    "mv_infonce": {},
    "mv_dhel": {},
    "tcl_views": {},
    "tcl_views supcon": {"scale": 6.0, "log_k1": -inf, "log_k2": 0.4},
    "groco": {},
    "groco few": {"top": 3, "steepness": 20.0},
    "one_to_k": {},
    "m2_mix": {"scale": 12.0},
    "m2_mix given": {"scale": 8.0, "lam": 0.3},
    "gcl": {},
    "alignment": {},
    "alignment cubed": {"alpha": 3.0},
    "uniformity": {},
    "structure": {"reference_batch": 8},
    "structure smooth": {"reference_batch": 8, "smooth": True},
    "paraphrase": {},
    "uniformity wide": {"t": 0.5, "mask_same_group": False},
    "sogclr": {},
    "isogclr": {"tau": 0.2},
    "fastclip": {},
    "fastclip v2": {"version": "v2", "tau": 0.15},
    "generative_negatives": {},
    "mochi": {"hardest": 3, "mixed": 4, "pulled": 2},
    "amcl": {"least": 0.2},
    "amcl few": {"hardest": 2, "beta": 0.3, "least": 0.05, "most": 1.0},
    "mochi plain": {"mixed": 0, "pulled": 0, "mask_same_group": False},
}


def named(case: str) -> str:
    """The term of a case."""
    return case.partition(" ")[0]


def run(name: str, z: Embeddings, **settings: Any) -> Tensor:
    """A term with these settings, made for this one call; one that needs further captions finds some.

    For `spurious` they are the negative pictures, which are ragged.
    """
    if "positive_text" in TERMS.entry(name).needs and z.positive_text is None:
        made = {"positive_text": z.negative_image, "positive_valid": z.valid}
        z = replace(z, **made) if name == "spurious" else with_paraphrases(z)
    return build(name, settings)(z)


def with_paraphrases(z: Embeddings) -> Embeddings:
    """Each caption's numbers backwards as its first paraphrase, its picture as the second where it is relevant."""
    exist = torch.ones(len(z), 2, dtype=torch.bool)
    if z.relevance is not None:
        exist[:, 1] = z.relevance > 0.5
    return replace(z, positive_text=torch.stack([z.text.flip(1), z.image], 1), positive_valid=exist)


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
    """Random fp64 tables; pairs have 0 to k valid negatives (at least two have none), and two share a picture.

    Two without tags, three without a class, among them those of one picture.
    """
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(n, k, generator=g) < torch.arange(n)[:, None] % 4 / 3
    group = torch.arange(n)
    group[n // 2] = group[0]
    other = torch.Generator().manual_seed(1000 + seed)
    return Embeddings(
        image=unit(g, n, d),
        text=unit(g, n, d),
        negative_text=unit(g, n, k, d),
        negative_image=unit(g, n, k, d),
        view_image=unit(other, n, 2, d),
        local_logit=9 * torch.randn(n, generator=other, dtype=torch.float64),
        negative_local_logit=9 * torch.randn(n, k, generator=other, dtype=torch.float64),
        valid=valid,
        id=torch.arange(n),
        group=group,
        relevance=(torch.arange(n) % 4 + 1) / 4,
        tag_logits=torch.sin(3.0 * torch.arange(1, 5 * n + 1, dtype=torch.float64) + seed).reshape(n, 5) * 4,
        tags=torch.tensor([1, 0, 2, 5, 0, 1, 3, 4])[torch.arange(n) % 8, None] > torch.arange(5),
        label=torch.tensor([-1, 2, 0, 2, -1, 0, -1, 2])[torch.arange(n) % 8],
        image_aspects=aspects(other, n),
        text_aspects=aspects(other, n),
        scale=torch.tensor([9.0], dtype=torch.float64),
        bias=torch.tensor([-3.0], dtype=torch.float64),
        teacher=Embeddings(unit(g, n, d), unit(g, n, d), unit(g, n, k, d)),
    )


def aspects(generator: torch.Generator, n: int, heads: int = 2, width: int = 3) -> Tensor:
    """Projections at unit length, and numbers that temperatures come from."""
    raw = torch.randn(n, heads, width, generator=generator, dtype=torch.float64)
    return torch.stack([unit(generator, n, heads, width), raw], 2)


def orthonormal(n: int = 4, k: int = 2, scale: float = 7.0) -> Embeddings:
    """Perfect pairs; negatives, captions and pictures, orthogonal to all but each other's partner."""
    basis = torch.eye(n + n * k, dtype=torch.float64)
    made = basis[n:].reshape(n, k, -1)
    return Embeddings(basis[:n], basis[:n], made, made, scale=scale, teacher=Embeddings(basis[:n], basis[:n], made))


def leaves(z: Embeddings, *, teacher: bool = False) -> list[Tensor]:
    """Make every table (and scale and bias) a leaf with gradient; returns them. With `teacher`, the teacher's too."""
    tables = [z.image, z.text, z.negative_text, z.scale, z.bias, z.negative_image]
    tables += [z.view_image, z.local_logit, z.negative_local_logit, z.image_aspects, z.text_aspects]
    tables += [z.tag_logits]
    if teacher and z.teacher:
        tables += [z.teacher.image, z.teacher.text, z.teacher.negative_text]
    return [x.requires_grad_() for x in tables if isinstance(x, Tensor)]
