"""The log's view of a step, against loops."""

from __future__ import annotations

import pytest
import torch

from clipkit.model.embeddings import Embeddings
from clipkit.objective import Objective
from clipkit.objective.measures import means, measures, pulls, temperatures
from tests.objective.cases import golden, leaves, ragged
from tests.objective.test_world import share
from tests.ranks import run_ranks


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


MIXED = {"infonce": {}, "igc": {"weight": 0.3}, "siglip": {"weight": 2.0}, "tgc": {"weight": 0.0}, "uniformity": {}}


def shares(z: Embeddings) -> dict[str, float]:
    objective = Objective(MIXED)
    leaves(z)
    objective(z.world(), at=z)
    return objective.pulls


def test_pulls_are_the_lengths_of_gradients():
    """Each term taken backward alone; the real backward pass and its gradient are none the wiser."""
    lengths = {}
    for name, settings in MIXED.items():
        z = ragged()
        tables = leaves(z)
        Objective({name: settings})(z)[0].backward()
        squares = [x.grad.square().sum() for x in tables if x.ndim > 1 and x.grad is not None]
        lengths[name] = float(sum(squares)) ** 0.5
    total = sum(lengths.values())
    assert shares(ragged()) == pytest.approx({name: length / total for name, length in lengths.items()}, abs=1e-12)

    sampled, plain = ragged(), ragged()
    for z, at in ((sampled, sampled), (plain, None)):
        tables, objective = leaves(z), Objective(MIXED)
        loss = objective(z, at=at)[0]
        assert all(x.grad is None for x in tables) and (objective.pulls == {}) == (at is None)
        loss.backward()
    for a, b in zip(leaves(sampled), leaves(plain)):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)  # pyright: ignore


def test_where_nothing_pulls_there_are_no_shares():
    z = ragged()
    assert all(value != value for value in pulls({"infonce": z.image.sum()}, z).values())


def on_a_rank(rank: int, world: int) -> dict[str, float]:
    """The contrasts once as a matrix and once in tiles, which ranks divide."""
    found = shares(share(ragged(), rank, world))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipkit.objective.tables.TILED_FROM", 1)
        tiled = shares(share(ragged(), rank, world))
    return found | {f"tiled {name}": value for name, value in tiled.items()}


def test_ranks_agree_on_pulls():
    alone = shares(ragged())
    expected = alone | {f"tiled {name}": value for name, value in alone.items()}
    for found in run_ranks(on_a_rank, 2):
        assert found == pytest.approx(expected, abs=1e-9)


def test_temperatures():
    assert temperatures({"infonce": {}}, 20.0, 0.3) == {"temperature": 0.05}
    z = golden()
    aligned = float((z.image * z.text).sum(1).mean())
    found = temperatures({"macl": {"weight": 2.0, "alpha": 0.5}}, 10.0, aligned)
    assert found == pytest.approx({"temperature": 0.1, "temperature/macl": 0.1267029999}, abs=1e-7)
