"""The log's view of a step, against loops."""

from __future__ import annotations

import pytest
import torch

from clipkit.model.embeddings import Embeddings
from clipkit.objective.measures import means, measures


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


def test_ranks_add_up() -> None:
    kinds = {5: "swap", 6: "replace"}
    parts = [measures(embeddings(n, n), kinds) for n in (2, 6)]
    whole = means(parts)
    for name, value in whole.items():
        total = sum(part.get(name, (0, 0))[0] for part in parts)
        assert value == pytest.approx(total / sum(part.get(name, (0, 0))[1] for part in parts))


def test_without_negatives_only_the_cosines() -> None:
    z = embeddings(4, 1)
    assert set(means([measures(Embeddings(z.image, z.text), {})])) == {"cosine/positive", "cosine/other"}
