"""What a negative counts: weight w is w copies of it in the softmax, 1 changes nothing, 0 takes it out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from clipkit.model.embeddings import Embeddings
from clipkit.objective import TERMS
from clipkit.objective import tables as tables_module
from tests.objective.cases import ragged
from tests.objective.pairs import Pairs, cross_entropy, dot

WEIGHED: list[tuple[str, dict[str, Any]]] = [
    ("infonce", {}),
    ("infonce", {"negatives": "own"}),
    ("igc", {}),
    ("tgc", {"scale": 7.0}),
]


@pytest.fixture(params=WEIGHED, ids=["infonce", "infonce own", "igc", "tgc"])
def term(request: pytest.FixtureRequest) -> Any:
    name, settings = request.param
    return lambda z: TERMS[name](z, **settings)


@pytest.fixture
def z() -> Embeddings:
    return ragged()


def weighted(z: Embeddings, weight: torch.Tensor) -> Embeddings:
    return replace(z, negative_weight=weight)


def test_one_changes_nothing(term: Any, z: Embeddings) -> None:
    assert z.valid is not None
    assert torch.equal(term(weighted(z, torch.ones(z.valid.shape))), term(z))


def test_zero_takes_a_negative_out(term: Any, z: Embeddings) -> None:
    assert z.valid is not None
    weight = torch.ones(z.valid.shape)
    weight[:, 0] = 0
    fewer = replace(z, valid=z.valid & (weight > 0))
    if z.teacher is not None:
        fewer.teacher = replace(z.teacher, valid=fewer.valid)
    assert torch.allclose(term(weighted(z, weight)), term(fewer), rtol=0, atol=1e-12)


def test_two_is_the_negative_twice(term: Any, z: Embeddings) -> None:
    assert z.valid is not None and z.negative_text is not None
    twice = Embeddings(
        z.image, z.text, negative_text=torch.cat([z.negative_text, z.negative_text[:, :1]], 1),
        valid=torch.cat([z.valid, z.valid[:, :1]], 1), id=z.id, group=z.group, scale=z.scale, teacher=z.teacher,
    )  # fmt: skip
    if z.teacher is not None:
        twice.teacher = replace(z.teacher, negative_text=None, valid=None)
    weight = torch.ones(z.valid.shape, dtype=torch.float64)
    weight[:, 0] = 2
    assert torch.allclose(term(weighted(z, weight)), term(twice), rtol=0, atol=1e-12)


def test_igc_by_loop(z: Embeddings) -> None:
    assert z.valid is not None
    weight = torch.rand(z.valid.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    p, rows = Pairs(z), []
    for i in p.rows:
        counts = [w for w, there in zip(weight[i].tolist(), z.valid[i].tolist()) if there]
        if counts:
            import math

            own = p.scale * dot(p.v[i], p.t[i])
            others = [p.scale * dot(p.v[i], n) + math.log(w) for n, w in zip(p.n[i], counts)]
            rows.append(cross_entropy(own, others))
    assert float(TERMS["igc"](weighted(z, weight))) == pytest.approx(sum(rows) / len(rows), abs=1e-10)


def test_tiles_weigh_alike(z: Embeddings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert z.valid is not None
    weight = torch.rand(z.valid.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = TERMS["infonce"](weighted(z, weight))
    monkeypatch.setattr(tables_module, "TILED_FROM", 0)
    assert torch.allclose(TERMS["infonce"](weighted(z, weight)), whole, rtol=0, atol=1e-10)


def test_a_row_whose_negatives_count_nothing_is_not_counted(z: Embeddings) -> None:
    assert z.valid is not None
    weight = torch.ones(z.valid.shape)
    weight[1] = 0
    rest = replace(z, valid=z.valid & (weight > 0), teacher=None)
    assert torch.allclose(TERMS["igc"](weighted(z, weight)), TERMS["igc"](rest), rtol=0, atol=1e-12)
    assert float(TERMS["igc"](weighted(z, torch.zeros(z.valid.shape)))) == 0.0
