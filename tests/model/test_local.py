"""Words against patches: the score by its loops, from every tower, cut in any way, on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkit import distributed
from clipkit.model.embeddings import Embeddings
from clipkit.model.local import local_logits
from tests.objective.cases import run
from tests.ranks import run_ranks


def raw(a: float, n: int) -> Tensor:
    """The specification's table, not normalised."""
    return torch.sin(a * torch.arange(1, n * 8 + 1, dtype=torch.float64)).reshape(n, 8)


def everywhere(words: Tensor) -> Tensor:
    return torch.ones(words.shape[:-1], dtype=torch.bool)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_golden_score(dtype: torch.dtype, tolerance: float):
    patches, words = raw(0.31, 3)[None].to(dtype), raw(0.53, 2)[None].to(dtype)
    got = local_logits(patches, words, everywhere(words), 10.0)
    assert got.dtype == dtype and got.item() == pytest.approx(9.0905983241, abs=tolerance)


def by_loops(patches: list[list[float]], words: list[list[float]], scale: float) -> float:
    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b))

    total = 0.0
    for word in words:
        near = [dot(word, patch) for patch in patches]
        lifted = [(x - min(near)) / (max(near) - min(near)) for x in near]
        seen = [sum(w * x for w, x in zip(lifted, column)) / sum(lifted) for column in zip(*patches)]
        total += math.exp(scale * dot(seen, word) / math.sqrt(dot(seen, seen) * dot(word, word)))
    return math.log(total)


def some(n: int = 3, p: int = 5, k: int = 2, t: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, words of k texts each, and which of their places are filled: some of each length, none for one."""
    g = torch.Generator().manual_seed(0)
    patches, words = (torch.randn(*s, 8, generator=g, dtype=torch.float64) for s in ((n, p), (n, k, t)))
    lengths = torch.arange(n * k).reshape(n, k) % (t + 1)
    return patches, words, torch.arange(t) < lengths[..., None]


def test_score_equals_its_loops():
    patches, words, spoken = some()
    got = local_logits(patches, words, spoken, 6.0)
    for n in range(3):
        for k in range(2):
            kept = words[n, k][spoken[n, k]].tolist()
            expected = by_loops(patches[n].tolist(), kept, 6.0) if kept else 0.0
            assert got[n, k].item() == pytest.approx(expected, abs=1e-12)


def test_slopes():
    """By differences, with the attention held where it is; padding gets none."""
    patches, words, spoken = (x.detach() for x in some(p=3, t=2))
    scale = torch.tensor(5.0, dtype=torch.float64)
    near = torch.einsum("nktd,npd->nktp", words, patches)
    attention = near - near.amin(-1, keepdim=True)
    attention = attention / attention.sum(-1, keepdim=True)

    def held(patches: Tensor, words: Tensor, scale: Tensor) -> Tensor:
        seen = torch.einsum("nktp,npd->nktd", attention, patches)
        cosines = (normalize(seen, dim=-1) * normalize(words, dim=-1)).sum(-1)
        return ((scale * cosines).exp() * spoken).sum(-1).clamp(min=1e-300).log().masked_fill(~spoken.any(-1), 0).sum()

    inputs = [x.requires_grad_() for x in (patches, words, scale)]
    got = torch.autograd.grad(local_logits(inputs[0], inputs[1], spoken, inputs[2]).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(held(*inputs), inputs), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(held, inputs) and not got[1][~spoken].any()


def test_permuting_patches_changes_nothing():
    patches, words, spoken = some()
    turned = local_logits(patches[:, [3, 0, 4, 2, 1]], words, spoken, 6.0)
    torch.testing.assert_close(turned, local_logits(patches, words, spoken, 6.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [1, 4])
def test_equal_patches_are_each_as_near(count: int):
    """The released code divides zero by zero. One patch is all there is to see."""
    _, words, spoken = some()
    patches = raw(0.3, 3)[:, None].expand(-1, count, -1).clone().requires_grad_()
    got = local_logits(patches, words, spoken, 6.0)
    cosines = (normalize(patches[:, :1, None], dim=-1) * normalize(words, dim=-1)).sum(-1)
    expected = (6 * cosines).masked_fill(~spoken, -torch.inf).logsumexp(-1).masked_fill(~spoken.any(-1), 0.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert torch.autograd.grad(got.sum(), patches)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_finite_and_computed_in_full(dtype: torch.dtype):
    patches, words, spoken = some()
    for x in (patches.to(dtype), torch.zeros(3, 5, 8, dtype=dtype), patches[:, :1].expand(-1, 5, -1).to(dtype)):
        x, y = x.clone().requires_grad_(), words.to(dtype).requires_grad_()
        got = local_logits(x, y, spoken, 100.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(got, local_logits(x.float(), y.float(), spoken, 100.0))
        slopes = torch.autograd.grad(got.sum(), [x, y])
        assert got.dtype == torch.float32 and all(s.isfinite().all() for s in (got, *slopes))


# ranks: no towers, only what comes out of them


def measured(rows: slice) -> list[Any]:
    """Loss and slopes of the rows' words, cut to their own longest, of the patches, and of the scale."""
    patches, words, spoken = (x[rows] for x in some(n=4, k=3))
    longest = int(spoken.sum(-1).max())
    inputs = [x.clone().requires_grad_() for x in (patches, words[..., :longest, :], torch.tensor([6.0]).double())]
    logits = local_logits(inputs[0], inputs[1], spoken[..., :longest], inputs[2])
    valid = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0]]).bool()[rows]
    same = normalize(patches[:, 0], dim=-1)
    z = Embeddings(
        same, same, same[:, None].expand(-1, 2, -1), valid=valid,
        local_logit=logits[:, 0], negative_local_logit=logits[:, 1:],
    )  # fmt: skip
    loss = run("fsc_local", z.world())
    loss.backward()
    x, y, scale = (x.grad for x in inputs)
    assert x is not None and y is not None and scale is not None
    y = nn.functional.pad(y, (0, 0, 0, 4 - longest))
    tables = [distributed.all_gather(g) / distributed.world_size() for g in (x, y)]
    return [loss.tolist(), *(g.tolist() for g in tables), distributed.all_gather(scale).mean().tolist(), longest]


def on_a_rank(rank: int, world: int) -> list[Any]:
    return measured(slice(rank * 4 // world, (rank + 1) * 4 // world))


def test_ranks_equal_one_process():
    *expected, _ = measured(slice(0, 4))
    found = run_ranks(on_a_rank, 4)
    assert len({longest for *_, longest in found}) > 1, "the ranks' texts must be of different lengths"
    for *got, _ in found:
        for one, several in zip(expected, got):
            torch.testing.assert_close(torch.tensor(several), torch.tensor(one), rtol=0, atol=1e-12)
