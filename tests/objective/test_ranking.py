"""The ranking term, and that an objective keeps what its terms remember."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clipkit.errors import UserError
from clipkit.objective import Objective
from clipkit.objective.ranking import Rank
from tests.objective.cases import golden, orthonormal, ragged


def test_margins_follow_the_gap():
    single = Rank()
    single(golden(torch.float32))
    assert single.margin is not None
    # The difference of two means of logits around 8, which single precision holds to 5e-7.
    assert single.margin.tolist() == pytest.approx([0.5332056244, 0.4485501312], abs=2e-6)
    z, term = golden(), Rank()
    plain = term(z)
    assert term.margin is not None and not term.margin.requires_grad
    assert term.margin.tolist() == pytest.approx([0.5332056244, 0.4485501312], abs=1e-10)
    other = 10 * torch.einsum("nd,nkd->nk", z.image, z.negative_text)
    hinge = (term.margin + other - 10 * (z.image * z.text).sum(1, keepdim=True)).relu()
    assert term(z).item() == pytest.approx(hinge.mean().item(), abs=1e-12) and term(z) > plain


@pytest.mark.parametrize(("scale", "expected"), [(7.0, 7.0), (30.0, 10.0)])
def test_margins_of_orthonormal_pairs_are_the_scale_up_to_a_bound(scale: float, expected: float):
    term = Rank()
    assert term(orthonormal(scale=scale)).item() == 0.0
    assert term.margin is not None and term.margin.tolist() == [expected, expected]
    assert term(orthonormal(scale=expected)).item() == pytest.approx(0.0, abs=1e-12)  # just met


def test_slope_of_the_hinge():
    """-1/BK on each violated positive logit, +1/BK on the negative one; nothing where the margin is met."""
    z = replace(orthonormal(4), negative_text=None, valid=None)
    negative = torch.stack([z.text, -z.text], 1).requires_grad_()
    text = z.text.clone().requires_grad_()
    Rank(least=0.5, most=0.5)(replace(z, text=text, negative_text=negative)).backward()
    assert text.grad is not None and negative.grad is not None
    torch.testing.assert_close(text.grad, -7 * z.image / 8)
    torch.testing.assert_close(negative.grad[:, 0], 7 * z.image / 8)
    assert not negative.grad[:, 1].any()


def test_a_place_without_negatives_keeps_its_margin():
    """In the released code the mean over nothing makes the margin NaN for ever."""
    z, term = golden(), Rank()
    term(z)
    assert term.margin is not None and z.valid is not None
    before = term.margin.tolist()
    valid = z.valid.clone()
    valid[:, 1] = False
    term(replace(z, valid=valid, scale=5.0))
    assert term.margin[1] == before[1] and term.margin[0] != before[0] and term.margin.isfinite().all()
    assert term(replace(z, valid=valid)).isfinite()


def test_a_margin_keeps_its_places():
    term = Rank()
    term(golden())
    with pytest.raises(UserError, match="keeps margins for 2 negatives a pair, got 3"):
        term(ragged())
    with pytest.raises(UserError, match="least \\(2\\) is above most"):
        Rank(least=2, most=1)


def test_an_objective_keeps_what_its_terms_remember():
    """Saved and taken back in the middle: the same values from there on."""
    terms = {"infonce": {}, "rank": {"weight": 0.5}}
    whole, first, second = Objective(terms), Objective(terms), Objective(terms)
    assert first.state() == {}
    batches = [ragged(seed=seed) for seed in range(4)]
    expected = [whole(z)[0].item() for z in batches]
    got = [first(z)[0].item() for z in batches[:2]]
    state = first.state()
    assert list(state) == ["rank.margin"]
    second.load_state(state)
    got += [second(z)[0].item() for z in batches[2:]]
    assert got == expected
    with pytest.raises(UserError, match="holds the state of rank, not in use here"):
        Objective({"infonce": {}}).load_state(state)


def test_an_objective_forgets_a_skipped_batch():
    """The first, too, before which nothing was known."""
    objective, margins = Objective({"rank": {}}), []
    for skipped in (True, False, True, False):
        objective(ragged(seed=len(margins)))
        if skipped:
            objective.undo()
        margins.append(objective.state().get("rank.margin", torch.zeros(3)).tolist())
    assert margins[0] == [0.0] * 3 and margins[1] == margins[2] != margins[3]
