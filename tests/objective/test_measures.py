"""The log's view of a step, against loops."""

from __future__ import annotations

import pytest
import torch

from clipkit.model.embeddings import Embeddings
from clipkit.objective import Objective
from clipkit.objective.measures import means, measures, pulls, temperatures
from tests.objective.cases import golden, leaves, ragged
from tests.objective.test_world import PULLING, pulls_of


def embeddings(n: int, seed: int) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, 8, generator=generator), dim=-1)

    valid = torch.rand(n, 3, generator=generator) < 0.7
    kind = torch.randint(5, 7, (n, 3), generator=generator).masked_fill(~valid, -1)
    return Embeddings(
        unit(n), unit(n), negative_text=unit(n, 3), valid=valid, negative_kind=kind, group=torch.arange(n) // 2
    )


def test_measures_are_their_formulas() -> None:
    z = embeddings(6, 0)
    found = means([measures(z, {5: "swap", 6: "replace", 7: "never seen"})])
    n = range(6)
    cosine = {(i, j): float(z.image[i] @ z.text[j]) for i in n for j in n}
    assert found["cosine/positive"] == pytest.approx(sum(cosine[i, i] for i in n) / 6, abs=1e-6)
    other = [cosine[i, j] for i in n for j in n if i // 2 != j // 2]
    assert found["cosine/other"] == pytest.approx(sum(other) / len(other), abs=1e-6)
    for number, kind in ((5, "swap"), (6, "replace")):
        gaps = [
            cosine[i, i] - float(z.image[i] @ z.negatives[0][i, k])
            for i in n for k in range(3) if z.valid[i, k] and z.negative_kind[i, k] == number
        ]  # fmt: skip
        assert found[f"gap/{kind}"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-6)
        assert found[f"wrong/{kind}"] == sum(gap <= 0 for gap in gaps) / len(gaps)
    assert "gap/never seen" not in found
    assert found["same_picture"] == 6 / 30


def test_ranks_add_up() -> None:
    kinds = {5: "swap", 6: "replace"}
    parts = [measures(embeddings(n, n), kinds) for n in (2, 6)]
    whole = means(parts)
    for name, value in whole.items():
        total = sum(part.get(name, (0, 0))[0] for part in parts)
        assert value == pytest.approx(total / sum(part.get(name, (0, 0))[1] for part in parts))


def test_without_negatives_only_the_cosines() -> None:
    z = embeddings(4, 1)
    assert set(means([measures(Embeddings(z.image, z.text), {})])) == {
        "cosine/positive",
        "cosine/other",
        "same_picture",
    }


def test_pulls_are_the_lengths_of_gradients():
    """Each term taken backward alone; the real backward pass is none the wiser. Over ranks: test_world."""
    lengths = {}
    for name, settings in PULLING.items():
        z = ragged()
        tables = leaves(z)
        Objective({name: settings})(z)[0].backward()
        squares = [x.grad.square().sum() for x in tables if x.ndim > 1 and x.grad is not None]
        lengths[name] = float(sum(squares)) ** 0.5
    total = sum(lengths.values())
    assert pulls_of(ragged()) == pytest.approx([length / total for length in lengths.values()], abs=1e-12)

    sampled, plain = ragged(), ragged()
    for z, at in ((sampled, sampled), (plain, None)):
        tables, objective = leaves(z), Objective(PULLING)
        loss = objective(z, at=at)[0]
        assert all(x.grad is None for x in tables) and (objective.pulls == {}) == (at is None)
        loss.backward()
    for a, b in zip(leaves(sampled), leaves(plain)):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)  # pyright: ignore


def test_where_nothing_pulls_there_are_no_shares():
    z = ragged()
    assert all(value != value for value in pulls({"infonce": z.image.sum()}, z).values())


def test_temperatures():
    assert temperatures({"infonce": {}}, 20.0, 0.3) == {"temperature": 0.05}
    z = golden()
    aligned = float((z.image * z.text).sum(1).mean())
    found = temperatures({"macl": {"weight": 2.0, "alpha": 0.5}}, 10.0, aligned)
    assert found == pytest.approx({"temperature": 0.1, "temperature/macl": 0.1267029999}, abs=1e-7)


def test_a_scale_of_nothing_is_an_infinite_temperature():
    infinite = {"temperature": float("inf"), "temperature/macl": float("inf")}
    assert temperatures({"macl": {}}, 0.0, 0.3) == infinite
