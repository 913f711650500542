"""Several ranks = one process: loss, gradients of every table, and the scale's, with unequal numbers of negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkit import distributed
from clipkit.model.embeddings import Embeddings
from clipkit.objective import Objective, objective
from clipkit.objective.queued import Mochi
from clipkit.objective.ranking import Rank
from tests.objective.cases import EVERY_TERM, leaves, named, ragged, run
from tests.ranks import run_ranks

MIXED = {"infonce": {}, "igc": {"weight": 0.1}, "tgc": {"weight": 0.1}, "distill": {"weight": 0.005}, "siglip": {}}


PULLING = {"infonce": {}, "igc": {"weight": 0.3}, "siglip": {"weight": 2.0}, "tgc": {"weight": 0.0}, "uniformity": {}}


def share(z: Embeddings, rank: int, world: int) -> Embeddings:
    """One rank's contiguous rows of every table."""
    n = len(z) // world
    rows = slice(rank * n, (rank + 1) * n)
    tables = {f.name: x[rows] for f in fields(z) if isinstance(x := getattr(z, f.name), Tensor) and len(x) == len(z)}
    return replace(z, **tables, teacher=z.teacher and share(z.teacher, rank, world))


def loss_of(case: str, z: Embeddings) -> Tensor:
    """One case of one term, a whole objective, or a term that remembers the step before."""
    if case == "remembered":
        term = Rank()
        return term(z) + term(z)
    if case == "queued":
        queue = Mochi(hardest=5, mixed=4, pulled=3)
        return queue(z) + queue(replace(z, id=z.id + 50, group=z.group + 50))
    return objective(z, MIXED)[0] if case == "objective" else run(named(case), z, **EVERY_TERM[case])


def measured(
    z: Embeddings, cases: Sequence[str] = (*EVERY_TERM, "objective", "remembered", "queued")
) -> dict[str, Any]:
    """Value and gradients of every loss as plain lists; scale and bias averaged over ranks as the engine does."""
    out = {}
    for case in cases:
        tables = {f.name: x for f in fields(z) if isinstance(x := getattr(z, f.name), Tensor)}
        fresh = replace(z, **{name: x.detach().clone() for name, x in tables.items()})
        inputs = leaves(fresh)
        loss = loss_of(case, fresh.world())
        loss.backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        table = [len(g) == len(fresh) for g in grads]  # of one row a pair; else scale or bias, of shape [1]
        rows = [distributed.all_gather(g) / distributed.world_size() for g, of in zip(grads, table) if of]
        shared = [distributed.all_gather(g).mean(0, keepdim=True) for g, of in zip(grads, table) if not of]
        out[case] = [loss.tolist(), *(g.tolist() for g in rows + shared)]
    return out


def pulls_of(z: Embeddings) -> list[float]:
    """Each term's share of the gradient, terms in their order."""
    shared = Objective(PULLING)
    leaves(z)
    shared(z.world(), at=z)
    return list(shared.pulls.values())


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    """Contrasts as matrices; pulls and made pairs also with the tiles that ranks divide."""
    out = measured(share(ragged(), rank, world)) | {"pulls": [pulls_of(share(ragged(), rank, world))]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipkit.objective.tables.TILED_FROM", 1)
        (made,) = measured(share(ragged(), rank, world), ["generative_negatives"]).values()
        return out | {"tiled pulls": [pulls_of(share(ragged(), rank, world))], "tiled pairs": made}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int):
    valid = ragged().valid
    assert valid is not None and len(valid.reshape(world, -1).sum(1).unique()) > 1, "validity counts must differ"
    expected = measured(ragged())
    expected["tiled pairs"] = expected["generative_negatives"]
    expected["pulls"] = expected["tiled pulls"] = [pulls_of(ragged())]
    for got in run_ranks(on_a_rank, world, timeout_s=120):
        assert got.keys() == expected.keys()
        for case, values in expected.items():
            for one, several in zip(values, got[case]):
                torch.testing.assert_close(torch.tensor(several), torch.tensor(one), rtol=0, atol=1e-12, msg=case)


def gathered(rank: int, world: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    whole = replace(
        ragged(),
        negative_image=torch.randn(8, 2, 6, generator=generator),
        negative_image_valid=torch.rand(8, 2, generator=generator) < 0.5,
        positive_text=torch.randn(8, 4, 6, generator=generator),
        positive_valid=torch.rand(8, 4, generator=generator) < 0.5,
        negative_kind=torch.randint(-1, 2**62, (8, 3), generator=generator),
    )
    local = share(whole, rank, world)
    assert local.teacher is not None
    leaves(local, teacher=True)
    z = local.world()
    for f in fields(z):
        x = getattr(z, f.name)
        if isinstance(x, Tensor):
            assert torch.equal(x, getattr(whole, f.name)) and x.dtype == getattr(whole, f.name).dtype, f.name
    assert z.teacher is not None and whole.teacher is not None
    assert torch.equal(z.teacher.text, whole.teacher.text) and not z.teacher.text.requires_grad
    assert z.image.requires_grad and z.negative_text is not None and z.negative_text.requires_grad
    lean = replace(local, teacher=replace(local.teacher, image=None)).world().teacher
    assert lean is not None and lean.image is None and torch.equal(lean.text, whole.teacher.text) and len(lean) == 8
    fresh = Embeddings(local.image, local.text).world()
    return {"id": fresh.id.tolist(), "group": fresh.group.tolist()}


def test_gathered_tables_are_the_whole_tables():
    """In rank order and of the same type; rows without id or group stay distinct."""
    for got in run_ranks(gathered, 2):
        assert got == {"id": list(range(8)), "group": list(range(8))}
