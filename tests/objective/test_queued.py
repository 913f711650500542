"""The queue of keys and what is mixed from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.model.embeddings import Embeddings
from clipkit.objective import Objective
from clipkit.objective.queued import Mochi, draws, products
from tests.objective import oracle
from tests.objective.cases import leaves, ragged, unit


def batches(count: int, n: int = 6) -> list[Embeddings]:
    """Batches of other pairs, of which one in each shows a picture of the first batch."""
    out = []
    for number in range(count):
        g = torch.Generator().manual_seed(number)
        id = torch.arange(n) + number * n
        out.append(
            Embeddings(
                unit(g, n, 5),
                unit(g, n, 5),
                id=id,
                group=torch.where(id % n == 2, 2, id),
                scale=torch.tensor(6.0),
                teacher=Embeddings(unit(g, n, 5), unit(g, n, 5)),
            )
        )
    return out


def moco(z: Embeddings, earlier: list[Embeddings], mask_same_group: bool = True) -> float:
    """MoCo's InfoNCE by loops, `earlier` in order of age, the batch's own keys among the rivals."""
    total, dictionary = 0.0, [z, *earlier]
    for query, side in ((z.image, "text"), (z.text, "image")):
        for i in range(len(z)):
            keys = [
                getattr(one.teacher, side)[j]
                for number, one in enumerate(dictionary)
                for j in range(len(one))
                if (number, j) != (0, i) and not (mask_same_group and one.group[j] == z.group[i])
            ]
            own = getattr(z.teacher, side)[i]
            total += oracle.cross_entropy(float(6 * query[i] @ own), [float(6 * query[i] @ key) for key in keys])
    return total / (2 * len(z))


@pytest.mark.parametrize("mask", [True, False])
def test_without_mixtures_it_is_moco(mask: bool):
    """Three batches, a queue of two: the oldest keys leave."""
    term, seen = Mochi(queue=12, mixed=0, pulled=0, mask_same_group=mask), []
    for z in batches(4):
        assert term(z).item() == pytest.approx(moco(z, seen[:2], mask), abs=1e-12)
        seen.insert(0, z)
    assert [len(x) for x in term.state().values()] == [12, 12, 12]
    without = Mochi(queue=0, mixed=0, pulled=0, mask_same_group=mask)
    for z in batches(2):
        assert without(z).item() == pytest.approx(moco(z, [], mask), abs=1e-12)


def mixtures(term: Mochi, z: Embeddings, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cosines with the keys of captions, and with what is mixed of them."""
    assert z.teacher is not None
    keys = z.teacher.text
    rivals = ~torch.eye(len(z), dtype=torch.bool)
    chance = draws(z.id, 3 * term.mixed + 2 * term.pulled)
    return query @ keys.T, *term._mixtures(query, keys, query @ keys.T, rivals, chance)


def test_mixtures_of_the_hardest_keys():
    """Of two equal keys it is the key itself; pulled towards the query, a key is never further from it than before."""
    z = batches(1)[0]
    cosines, mixed, pulled = mixtures(Mochi(hardest=1, mixed=5, pulled=40), z, z.image)
    nearest = cosines.masked_fill(torch.eye(6, dtype=torch.bool), -1).amax(1, keepdim=True)
    torch.testing.assert_close(mixed, nearest.expand(-1, 5))
    assert (pulled >= nearest - 1e-12).all() and (pulled > nearest + 0.05).any()
    assert (pulled < 1).all(), "the query is never its own negative"


def test_mixtures_send_gradient_through_the_query_alone():
    """As if they were given: d(q·h)/dq is h, of unit length."""
    z = batches(1)[0]
    query = z.image.clone().requires_grad_()
    _, mixed, pulled = mixtures(Mochi(mixed=1, pulled=1), z, query)
    for cosine in (mixed, pulled):
        (slope,) = torch.autograd.grad(cosine.sum(), query, retain_graph=True)
        torch.testing.assert_close(slope.norm(dim=1), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close((slope * query).sum(1, keepdim=True), cosine)
    inputs = leaves(z, teacher=True)
    Mochi(hardest=3)(z).backward()
    assert z.teacher is not None and z.teacher.image.grad is None and z.teacher.text.grad is None
    assert all(x.grad is not None for x in inputs[:3])


def test_opposite_keys_mix_without_nan():
    z = batches(1)[0]
    line = normalize(torch.ones(6, 5, dtype=torch.float64), dim=1) * torch.tensor([[1.0], [-1]]).repeat(3, 1)
    image = z.image.clone().requires_grad_()
    loss = Mochi(mixed=50)(replace(z, image=image, teacher=Embeddings(line, line), scale=100.0))
    loss.backward()
    assert loss.isfinite() and image.grad is not None and image.grad.isfinite().all()


def test_what_is_drawn_is_a_function_of_the_ids():
    ids = torch.tensor([7, 3, 900, 12])
    table, turned = draws(ids, 5), draws(ids.flip(0), 5)
    assert torch.equal(table, turned.flip(0)) and len(table.unique()) == 20
    assert not torch.equal(table, draws(ids + 1, 5)) and ((table >= 0) & (table < 1)).all()


def test_products_of_pairs_of_keys(monkeypatch: pytest.MonkeyPatch):
    g = torch.Generator().manual_seed(0)
    keys, (x, y) = unit(g, 9, 4), torch.randint(9, (2, 7, 3), generator=g)
    expected = (keys @ keys.T)[x, y]
    torch.testing.assert_close(products(keys, x, y), expected)
    monkeypatch.setattr("clipkit.objective.queued.AT_ONCE", 30)
    torch.testing.assert_close(products(keys, x, y), expected)


def test_a_queue_taken_back_goes_on_as_before():
    """Saved after two batches; and a skipped batch leaves no keys behind."""
    terms = {"mochi": {"queue": 14, "hardest": 4, "mixed": 3, "pulled": 2}}
    whole, first, second = Objective(terms), Objective(terms), Objective(terms)
    expected = [whole(z)[0].item() for z in batches(4)]
    got = [first(z)[0].item() for z in batches(2)]
    second.load_state({name: value.clone() for name, value in first.state().items()})
    assert sorted(second.state()) == ["mochi.group", "mochi.image", "mochi.text"]
    second(ragged(n=6, d=5))
    second.undo()
    assert got + [second(z)[0].item() for z in batches(4)[2:]] == expected
