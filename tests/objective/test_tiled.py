"""Tiles equal the matrix: value and every gradient, in every form, whatever tiles do not divide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.errors import UserError
from clipkit.objective import tables, tiled
from clipkit.objective.tables import Block, contrast_tables, pairs, rivals
from tests.objective import test_terms
from tests.objective.cases import EVERY_TERM, named, ragged, unit
from tests.objective.test_world import measured, share
from tests.ranks import run_ranks

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"both": True},
    "DCL": {"log_alpha": -torch.inf, "both": True},
    "extra": {"log_alpha": 0.7, "extra": True},
    "log_sum": {"mode": "log_sum", "both": True},
    "log_sum, extra": {"mode": "log_sum", "extra": True, "log_alpha": -0.5},
    "focal": {"gamma": 2.0, "both": True},
    "focal, extra": {"gamma": 0.5, "extra": True, "log_alpha": 1.0},
    "focal, above 0": {"gamma": 1.5, "both": True, "log_alpha": -torch.inf, "extra": True},
}
RELATIONS = ["pairs", "groups", "weights"]
every_form = pytest.mark.parametrize("form", FORMS)


@contextmanager
def tiles(height: int = 3, width: int = 5, *, at_least: float = 0) -> Iterator[None]:
    """Tiles of this shape for everything; the matrix with `at_least` infinite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "TILES", {"cpu": (height, width), "gpu": (height, width)})
        patch.setattr(tables, "TILED_FROM", at_least)
        yield


def matrix() -> Any:
    return tiles(at_least=float("inf"))


class Case:
    """Random tables: n anchors, n candidates, and m more of which some do not exist."""

    def __init__(self, n: int, m: int, d: int, seed: int = 0, scale: float = 9.0, device: str = "cpu"):
        g = torch.Generator().manual_seed(seed)
        extra = torch.randn(n, 2, generator=g, dtype=torch.float64)
        extra[: n // 3, 0] = -torch.inf
        inputs = unit(g, n, d), unit(g, n, d), unit(g, m, d), torch.full((1,), scale, dtype=torch.float64), extra
        self.inputs = [x.to(device) for x in inputs]
        self.group = torch.randint(0, max(n // 2, 1), (n,), generator=g).to(device)
        self.valid = (torch.rand(m, generator=g) < 0.7).to(device)
        self.upstream = [torch.randn(n, generator=g, dtype=torch.float64).to(device) for _ in range(2)]
        self.device = torch.device(device)

    def pairs(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        return pairs(len(self.group), self.device, self.group)(rows, columns)

    def groups(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        """Several positives, none in group 0; anchor 1 sees nothing."""
        group = self.group[rows, None]
        seen = torch.arange(rows.start, rows.stop, device=self.device)[:, None] != 1
        return (group == self.group[columns]) & (group > 0), seen

    def weights(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        """Soft targets and log-weights, some of them -inf; many tiles hold no target."""
        i, j = (torch.arange(x.start, x.stop, device=self.device) for x in (rows, columns))
        wave = torch.sin(3.0 * i[:, None] + j)
        target = (wave - 0.9).clamp(min=0.0)
        return (target if target.any() else None), (wave + 0.8).clamp(min=0.0).log()

    def run(
        self, relation: str, dtype: torch.dtype = torch.float64, *, extra: bool = False, **form: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Rows; gradients of anchors, both tables, scale and extra terms."""
        inputs = [x.to(dtype).requires_grad_() for x in self.inputs]
        anchors, first, second, scale, terms = inputs
        blocks = [Block(first, getattr(self, relation)), Block(second, rivals(self.valid))]
        rows = contrast_tables(anchors, blocks, scale=scale, extra=terms if extra else None, **form)
        total = sum((x * g.to(x.dtype)).sum() for x, g in zip(rows, self.upstream))
        assert isinstance(total, Tensor)
        grads = torch.autograd.grad(total, inputs if extra else inputs[:4])
        return [x.detach() for x in rows], list(grads)


def close(got: list[Tensor], expected: list[Tensor], tolerance: float, least: float = 1e-3) -> None:
    """Each table within `tolerance` of its norm, or of `least` where that is more."""
    assert len(got) == len(expected)
    for x, y in zip(got, expected):
        assert x.shape == y.shape and x.isfinite().all()
        assert (x.double() - y.double()).norm() <= tolerance * max(y.norm().item(), least)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 17), st.integers(0, 23), st.integers(1, 9)),
    tile=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    form=st.sampled_from(list(FORMS)),
    relation=st.sampled_from(RELATIONS),
    scale=st.sampled_from([0.0, 9.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_tiles_equal_the_matrix(shape, tile, form, relation, scale, seed):
    case = Case(*shape, seed=seed, scale=scale)
    with matrix():
        rows, grads = case.run(relation, **FORMS[form])
    with tiles(*tile):
        got = case.run(relation, **FORMS[form])
    close(got[0], rows, 1e-10)
    # With one dimension the gradient of the anchors is 0: what is there is rounding, in proportion to the scale.
    close(got[1], grads, 1e-10, least=1e-3 * max(1.0, scale))


@every_form
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("scale", "tolerance"), [(10.0, 1e-6), (100.0, 3e-6)])
def test_single_precision(form: str, relation: str, scale: float, tolerance: float):
    """Against fp64. At scale 100 the softmaxes are known to a few 1e-6, by matrix too."""
    case = Case(50, 70, 16, scale=scale)
    with matrix():
        exact = case.run(relation, **FORMS[form])
    with tiles(16, 32):
        got = case.run(relation, torch.float32, **FORMS[form])
    close(got[0], exact[0], 1e-6)
    close(got[1], exact[1], tolerance)
    assert got[0][0].dtype == torch.float32


def test_as_they_are():
    """The shape of tiles and the threshold that everybody gets."""
    case = Case(600, 1100, 64)
    with matrix():
        exact = case.run("pairs", both=True)
    for x, y in zip(case.run("pairs", torch.float32, both=True), exact):
        close(x, y, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_form
def test_half_precision_is_summed_in_full(form: str, dtype: torch.dtype):
    """Rows are those of the same numbers in fp32, and gradients are rounded once."""
    case = Case(11, 13, 8)
    case.inputs = [x.to(dtype) for x in case.inputs]
    with tiles():
        rows, grads = case.run("weights", dtype, **FORMS[form])
        full, slopes = case.run("weights", torch.float32, **FORMS[form])
    assert all(torch.equal(x, y) for x, y in zip(rows, full))
    assert all(torch.equal(x, y.to(dtype)) for x, y in zip(grads, slopes))


@every_form
def test_gradcheck(form: str):
    case = Case(5, 4, 3)
    how = {key: value for key, value in FORMS[form].items() if key != "extra"}
    inputs = [x.requires_grad_() for x in case.inputs]

    def run(anchors: Tensor, first: Tensor, second: Tensor, scale: Tensor, extra: Tensor) -> tuple[Tensor, ...]:
        blocks = [Block(first, case.groups), Block(second, rivals(case.valid))]
        return contrast_tables(anchors, blocks, scale=scale, extra=extra, **how)

    with tiles(2, 3):
        inputs[4] = inputs[4].detach().clamp(min=-3.0).requires_grad_()  # no finite differences of -inf
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_a_second_derivative_is_refused():
    case = Case(4, 3, 2)
    anchors, first, *_ = (x.requires_grad_() for x in case.inputs)
    with tiles():
        (rows,) = contrast_tables(anchors, [Block(first, case.pairs)])
        with pytest.raises(UserError, match="second derivative.*TILED_FROM"):
            torch.autograd.grad(rows.sum(), anchors, create_graph=True)
    with matrix():
        (rows,) = contrast_tables(anchors, [Block(first, case.pairs)])
        (slope,) = torch.autograd.grad(rows.sum(), anchors, create_graph=True)
        assert slope.requires_grad


def test_only_what_wants_a_gradient_gets_one():
    """A locked tower, a scale that does not learn: the others' gradients stay as they are."""
    with tiles():
        _, everything = Case(7, 6, 4).run("groups", both=True, extra=True)
        for chosen in range(5):
            case = Case(7, 6, 4)
            case.inputs[chosen].requires_grad_()
            anchors, first, second, scale, extra = case.inputs
            blocks = [Block(first, case.groups), Block(second, rivals(case.valid))]
            rows = contrast_tables(anchors, blocks, scale=scale, extra=extra, both=True)
            torch.autograd.backward(rows, case.upstream)
            assert [x.grad is not None for x in case.inputs] == [i == chosen for i in range(5)]
            torch.testing.assert_close(case.inputs[chosen].grad, everything[chosen])


def test_a_plain_number_is_a_scale():
    case = Case(5, 4, 3)
    with tiles():
        by_number, by_tensor = (
            contrast_tables(case.inputs[0], [Block(case.inputs[1], case.pairs)], scale=scale)[0]
            for scale in (0.1, torch.tensor(0.1, dtype=torch.float64))
        )
    assert torch.equal(by_number, by_tensor)


def test_a_nan_is_not_hidden():
    case = Case(5, 4, 3)
    case.inputs[0][2] = torch.nan
    for form in FORMS.values():
        how = {key: value for key, value in form.items() if key != "extra"}
        with tiles():
            rows = contrast_tables(case.inputs[0], [Block(case.inputs[1], case.pairs)], **how)
        assert rows[0].isnan().tolist() == [i == 2 for i in range(5)]


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest new tensor held."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@every_form
@pytest.mark.parametrize("relation", RELATIONS)
def test_nothing_is_as_large_as_the_matrix(form: str, relation: str):
    case = Case(60, 70, 3)
    with tiles(8, 8), Largest() as seen:
        case.run(relation, **FORMS[form])
    assert seen.numbers <= 70 * 3
    with matrix(), Largest() as seen:
        case.run(relation, **FORMS[form])
    assert seen.numbers >= 60 * 130


def test_the_shapes_alone_choose(monkeypatch: pytest.MonkeyPatch):
    chosen = []
    monkeypatch.setattr(tables, "tiled_rows", lambda x, *args, **how: chosen.append(len(x)) or (x[:, 0],))
    for candidates in (1023, 1024):
        block = Block(torch.zeros(candidates, 2), rivals(torch.ones(candidates, dtype=torch.bool)))
        contrast_tables(torch.zeros(512, 2), [block])
    assert chosen == [512]


TERM_TESTS = [
    test_terms.test_gradcheck,
    test_terms.test_no_gradient_reaches_the_teacher,
    test_terms.test_permuting_the_batch_changes_nothing,
    test_terms.test_permuting_a_pairs_negatives_changes_nothing,
    test_terms.test_invalid_negatives_add_nothing,
    test_terms.test_half_precision_is_computed_in_full,
    partial(test_terms.test_equals_its_loops, seed=1),
    *(
        partial(test_terms.test_extremes_are_finite, dtype=dtype, kind=kind)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        for kind in ("random", "equal", "single", "duplicates", "opposite")
    ),
]
INFONCE = [case for case in EVERY_TERM if named(case) == "infonce"]


@pytest.mark.parametrize("case", INFONCE)
@pytest.mark.parametrize("check", TERM_TESTS, ids=lambda x: getattr(x, "__name__", None))
def test_infonce_passes_its_tests_in_tiles(check: Callable[[str], None], case: str):
    with tiles():
        check(case)


def test_infonce_passes_its_other_tests_in_tiles():
    with tiles():
        for name, how, expected in test_terms.GOLDEN[:3]:
            for dtype in test_terms.TOLERANCE:
                test_terms.test_golden_values(name, how, expected, dtype)
        for case in ("infonce", "infonce own"):
            test_terms.test_without_negatives_it_is_the_plain_form(case)
            test_terms.test_swapping_negatives_between_pairs(case, "own" in case)
        test_terms.test_captions_of_the_same_picture_are_no_negatives("infonce")
        test_terms.test_one_picture_only("infonce none")
        test_terms.test_closed_forms()
        test_terms.test_negatives_equal_to_their_caption()
        test_terms.test_identical_embeddings()
        test_terms.test_gradient_of_infonce_rows()


def infonce_on_a_rank(rank: int, world: int) -> dict[str, Any]:
    with tiles():
        return measured(share(ragged(), rank, world), INFONCE)


def test_ranks_equal_one_process():
    """The matrix in one process, tiles divided among ranks: value, every table's gradient, the scale's."""
    expected = measured(ragged(), INFONCE)
    for got in run_ranks(infonce_on_a_rank, 2):
        assert got.keys() == expected.keys()
        for case, values in expected.items():
            for one, several in zip(values, got[case]):
                torch.testing.assert_close(torch.tensor(several), torch.tensor(one), rtol=0, atol=1e-12, msg=case)


def forms_on_a_rank(rank: int, world: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Every form on tables that are replicated, gradients as they come."""
    with tiles():
        return {
            f"{form} {relation}": Case(7, 9, 4).run(relation, replicated=True, **how)
            for form, how in FORMS.items()
            for relation in RELATIONS
        }


def test_ranks_divide_the_work():
    """Rows are whole everywhere. Gradients average to the whole; those of anchors hold nothing of others' anchors."""
    ranks = run_ranks(forms_on_a_rank, 3)
    with matrix():
        for key in ranks[0]:
            form, _, relation = key.rpartition(" ")
            rows, grads = Case(7, 9, 4).run(relation, **FORMS[form])
            for got, _ in (rank[key] for rank in ranks):
                close(got, rows, 1e-12)
            close([torch.stack(x).mean(0) for x in zip(*(rank[key][1] for rank in ranks))], grads, 1e-12)
            shares = [rank[key][1][0].any(1) for rank in ranks]
            assert not any((x & y).any() for x, y in combinations(shares, 2))


@pytest.mark.gpu
@every_form
def test_a_gpu_gives_the_same(form: str):
    with matrix():
        rows, grads = Case(50, 70, 16).run("weights", **FORMS[form])
    with tiles(16, 32):
        got = Case(50, 70, 16, device="cuda").run("weights", **FORMS[form])
        single = Case(50, 70, 16, device="cuda").run("weights", torch.float32, **FORMS[form])
    close([x.cpu() for x in got[0] + got[1]], rows + grads, 1e-10)
    close([x.cpu() for x in single[0] + single[1]], rows + grads, 1e-6)
