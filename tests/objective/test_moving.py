"""SogCLR, iSogCLR, FastCLIP over several steps: their loops, slopes, temperatures, ranks, and what is kept."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from math import cos, pi
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective import Objective, build
from tests.objective import oracle
from tests.objective.cases import golden, leaves, named, ragged, run, unit
from tests.objective.oracle_moving import Past
from tests.objective.test_tiled import tiles
from tests.objective.test_world import share
from tests.ranks import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "sogclr": {"gamma": 0.4},
    "isogclr": {"tau": 0.2, "rho": 0.3},
    "fastclip": {"visits": 3, "rho": 0.7},
    "fastclip v0": {"version": "v0", "visits": 0},
    "fastclip v1": {"version": "v1", "gamma": 0.6},
    "fastclip v2": {"version": "v2", "tau": 0.2, "visits": 2, "rho": -0.1},
}
every_case = pytest.mark.parametrize("case", CASES)


def batch(step: int) -> Embeddings:
    """8 of 14 samples, two of a picture; from step 2 on one comes up twice, and step 4 shows one picture only."""
    generator = torch.Generator().manual_seed(100 + step)
    z, id = ragged(seed=step), torch.randperm(14, generator=generator)[:8]
    if step >= 2:
        id[5] = id[1]
    group = torch.zeros(8, dtype=torch.int64) if step == 4 else id // 2 * 2
    return replace(z, id=id, group=group)


def steps(case: str, first: int = 0, last: int = 7, state: dict[str, Tensor] | None = None) -> tuple[list[Any], Any]:
    """Values and gradients of the steps, step 3 skipped and undone behind it; and the objective."""
    objective = Objective({named(case): CASES[case] | {"weight": 2.0}})
    objective.load_state(state or {})
    found = []
    rank, world = distributed.rank(), distributed.world_size()
    for step in range(first, last):
        z = share(batch(step), rank, world)
        inputs = leaves(z)
        loss, values = objective(z.world())
        loss.backward()
        if step == 3:
            objective.undo()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
        rows = [distributed.all_gather(x) / world for x in grads[:2]]
        found.append([*values.values(), *rows, distributed.all_gather(grads[3]).mean(0, keepdim=True)])
    return found, objective


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11, equal_nan=True)


@every_case
def test_several_steps_equal_their_loops(case: str):
    """Values, and all that is known of every sample in the end."""
    found, objective = steps(case)
    past: Past = {}
    for step, (value, *_) in enumerate(found):
        before = dict(past)
        expected = oracle.term(named(case), batch(step), CASES[case] | {"past": past})
        assert value.item() == pytest.approx(expected, abs=1e-10), step
        if step == 3:
            past = before
    state = {key.partition(".")[2]: value for key, value in objective.state().items()}
    known = {id for _, id in past}
    assert len(known) > 10 and known == set((~state["log_u_image"].isnan()).nonzero().flatten().tolist())
    for (side, id), kept in past.items():
        assert state[f"log_u_{side}"][id].exp().item() == pytest.approx(kept.pop("u"), rel=1e-9)
        for name, value in kept.items():
            column = name if name == "visits" else f"{name}_{side}"
            assert state[column][id].item() == pytest.approx(value, abs=1e-10), column


@every_case
def test_taken_up_again_it_goes_on_bit_for_bit(case: str):
    whole, end = steps(case)
    state = steps(case, last=5)[1].state()
    rest, again = steps(case, first=5, state=state)
    assert all(torch.equal(x, y) for one, other in zip(rest, whole[5:], strict=True) for x, y in zip(one, other))
    torch.testing.assert_close(again.state(), end.state(), rtol=0, atol=0, equal_nan=True)


Kept = dict[str, dict[str, Tensor]]


def on_a_rank(rank: int, world: int, first: int = 0, states: Kept | None = None) -> tuple[dict[str, Any], Kept, Kept]:
    """Every case's steps; what is kept at step 5 and at the end."""
    found, middle, end = {}, {}, {}
    with tiles(at_least=0 if world == 2 else torch.inf):
        for case in CASES:
            values, objective = steps(case, first, 5, states and states[case])
            middle[case] = objective.state()
            more, objective = steps(case, max(first, 5), 7, middle[case] if world == 1 else reload(objective))
            found[case], end[case] = [*values, *more], objective.state()
    return found, middle, end


def reload(objective: Objective) -> dict[str, Tensor]:
    """What a checkpoint hands to every rank."""
    (state,) = [state for state in distributed.gather_objects(objective.state()) if state]
    return state


def test_ranks_equal_one_process():
    """Values, gradients and states of two ranks in tiles; what they keep is taken up by four, and by one."""
    found, middle, end = on_a_rank(0, 1)
    two = run_ranks(on_a_rank, 2)
    for got, _, _ in two:
        close(got, found)
    close(two[0][1:], (middle, end))
    assert all(state == {} for state in two[1][2].values())
    for ranks in (run_ranks(partial(on_a_rank, first=5, states=two[0][1]), 4), [on_a_rank(0, 1, 5, two[0][1])]):
        for got, _, _ in ranks:
            close(got, {case: values[5:] for case, values in found.items()})
        close(ranks[0][2], end)


def slopes(z: Embeddings, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [z.image, z.text]))


def test_the_slope_is_that_of_the_true_objective():
    """tau log mean e^{h / tau}, summed over both ways, on the specification's tables; there 1 is gamma's only value."""
    z = golden()
    inputs = leaves(z)
    true = 2 * (run("dcl", z) - torch.tensor(3.0).log()) / 10
    assert true.item() == pytest.approx(-1.0295680303, abs=1e-7)
    expected = slopes(z, true)
    for loss in (run("sogclr", z, gamma=1.0), run("sogclr", z), run("isogclr", z, tau=0.1)):
        close(slopes(z, loss), expected)
    for version in ("v1", "v2", "v3"):
        tau = {"tau": 0.1} if version == "v2" else {}
        close(slopes(z, 2 * run("fastclip", z, version=version, **tau)), expected)
    close(slopes(z, 0.2 * run("fastclip", z, version="v0")), expected)
    assert all(x.grad is None for x in inputs)


@pytest.mark.parametrize("version", ["v0", "v3"])
def test_the_learned_temperature_against_finite_differences(version: str):
    """Of the value itself: at a first visit u is g."""
    z, eps = golden(), 1e-6
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    run("fastclip", replace(z, scale=scale), version=version).backward()
    up, down = (run("fastclip", replace(z, scale=10.0 + x), version=version).item() for x in (eps, -eps))
    assert scale.grad is not None and scale.grad.item() == pytest.approx((up - down) / (2 * eps), abs=1e-8)
    assert abs(scale.grad.item()) > 1e-3


def test_the_scale_learns_nothing_where_it_is_a_setting():
    for case in ("sogclr", "isogclr", "fastclip v1", "fastclip v2"):
        objective = Objective({named(case): CASES[case]})
        z = ragged()
        scale = leaves(z)[3]
        objective(z)[0].backward()
        assert scale.grad is not None and scale.grad.item() == 0.0


def kept(term: Any, column: str) -> Tensor:
    return term.samples.state()[column]


def test_single_temperatures_against_finite_differences():
    """With beta 1 the moment is the slope of tau_i (log mean e^{h / tau_i} + rho) in tau_i; Adam's first is a tenth."""
    z, tau, rho, eps = golden(), 0.3, 0.7, 1e-6
    cosines = z.image @ z.text.T
    apart = ~torch.eye(4, dtype=torch.bool)
    for side, table in (("image", cosines), ("text", cosines.T)):
        h = (table - table.diagonal()[:, None])[apart].reshape(4, 3)
        at = [t * ((h / t).exp().mean(1).log() + rho) for t in (tau + eps, tau - eps)]
        slope = (at[0] - at[1]) / (2 * eps)
        assert slope.abs().max() < 5 and slope.std() > 0.01
        isogclr, fastclip = (
            build("isogclr", {"tau": tau, "rho": rho, "beta": 1.0, "gamma": 1.0}),
            build("fastclip", {"version": "v2", "tau": tau, "rho": rho}),
        )
        isogclr(z)
        fastclip(z)
        torch.testing.assert_close(kept(isogclr, f"moment_{side}"), slope, rtol=0, atol=1e-8)
        torch.testing.assert_close(kept(isogclr, f"tau_{side}"), tau - 0.03 * slope, rtol=0, atol=1e-8)
        torch.testing.assert_close(kept(fastclip, f"moment_{side}"), slope / 10, rtol=0, atol=1e-8)
        torch.testing.assert_close(kept(fastclip, f"tau_{side}"), tau - 0.0133 * slope.sign(), rtol=0, atol=1e-8)


def test_temperatures_keep_to_their_bounds():
    for settings, least in (({"rho": 40.0}, 0.005), ({"rho": -40.0}, 1.0)):
        term = build("isogclr", {"tau": 0.1, "eta": 1.0} | settings)
        term(golden())
        assert kept(term, "tau_image").tolist() == [least] * 4 and kept(term, "moment_text").abs().max() == 4.5
    for rho, bound in ((40.0, 0.01), (-40.0, 1.0)):
        term = build("fastclip", {"version": "v2", "rho": rho, "eta": 1.0})
        term(golden())
        assert kept(term, "tau_text").tolist() == [bound] * 4


def test_two_samples_are_two_and_a_new_one_begins_with_its_batch():
    """Read again in other company, the known ones remember, the new ones do not."""
    term, z = build("sogclr", {"gamma": 0.25}), ragged()
    first = replace(z, id=torch.arange(8), group=torch.arange(8))
    term(first)
    begun = kept(term, "log_u_text")
    assert len(begun.unique()) == 8
    second = replace(ragged(seed=1), id=torch.arange(4, 12), group=torch.arange(4, 12))
    term(second)
    fresh = build("sogclr", {})
    fresh(second)
    g, u = kept(fresh, "log_u_text")[4:].exp(), kept(term, "log_u_text").exp()
    torch.testing.assert_close(u[8:], g[4:])
    torch.testing.assert_close(u[4:8], 0.75 * begun[4:].exp() + 0.25 * g[:4])
    torch.testing.assert_close(u[:4], begun[:4].exp())


def test_gamma_falls_with_the_visits_of_each_sample():
    """What a sample's u becomes says which gamma it had; a latecomer begins anew."""
    term, seen = build("fastclip", {"gamma": 0.2, "visits": 4}), []
    pairs = torch.arange(8), torch.arange(8, 16)
    for visit in range(7):
        z = ragged(seed=visit)
        before = term.state().get("log_u_image", torch.empty(0))
        for id in pairs if visit >= 2 else pairs[:1]:
            term(replace(z, id=id, group=id))
        fresh = build("fastclip", {})
        fresh(replace(z, id=pairs[0], group=pairs[0]))
        u, g = kept(term, "log_u_image").exp(), kept(fresh, "log_u_image").exp()
        if visit:
            seen.append(((u[:8] - before[:8].exp()) / (g - before[:8].exp())).mean().item())
        if visit == 2:
            torch.testing.assert_close(u[8:], g)
    wanted = [0.2 + 0.4 * (1 + cos(pi * min(visit, 4) / 4)) for visit in range(1, 7)]
    assert seen == pytest.approx(wanted, abs=1e-9)
    assert kept(term, "visits").tolist() == [7.0] * 8 + [5.0] * 8


def test_what_a_version_does_not_use_is_refused():
    for settings in ({"version": "v0", "rho": 1.0}, {"version": "v1", "rho": 7.0}, {"tau": 0.1}, {"eta": 0.1}):
        with pytest.raises(UserError, match="fastclip: (rho|tau|eta) is nothing to v"):
            build("fastclip", settings)
    term = build("fastclip", {"version": "v3"})
    term(golden())
    with pytest.raises(UserError, match="keeps log_u_image, log_u_text, visits of each sample where"):
        build("fastclip", {"version": "v2"}).load_state(term.state())


def test_small_batches_remember_the_whole():
    """48 samples that do not move, read 6 at a time: log u comes near to that over all of them, log g falls short."""
    generator = torch.Generator().manual_seed(3)
    image, text = unit(generator, 48, 8), unit(generator, 48, 8)

    def log_u(gamma: float, size: int, epochs: int) -> Tensor:
        term = build("fastclip", {"version": "v1", "gamma": gamma, "visits": 0})
        for _ in range(epochs):
            for ids in torch.randperm(48, generator=generator).split(size):
                term(Embeddings(image[ids], text[ids], id=ids, scale=8.0))
        return kept(term, "log_u_image")

    whole = log_u(1.0, 48, 1)
    short, near = ((log_u(gamma, 6, 9) - whole).mean().item() for gamma in (1.0, 0.2))
    assert short < -0.5 and abs(near) < 0.4 * abs(short)


@pytest.mark.gpu
@every_case
def test_a_gpu_gives_the_same(case: str):
    found = []
    for device in ("cpu", "cuda"):
        objective, losses = Objective({named(case): CASES[case]}), []
        for step in range(4):
            z = replace(batch(step), teacher=None)
            tables = {f.name: x.to(device) for f in fields(z) if isinstance(x := getattr(z, f.name), Tensor)}
            losses.append(objective(replace(z, **tables))[0].cpu())
        objective.undo()
        objective.load_state(objective.state())
        found.append((losses, objective.state()))
    close(*found)
