"""The multi-rank runner itself."""

from __future__ import annotations

import os
import time
from functools import partial

import pytest
import torch

from clipkit import distributed
from clipkit.errors import UserError
from tests.ranks import RankError, run_ranks


def _sum(offset: int, rank: int, world: int) -> tuple[int, float]:
    value = distributed.all_gather(torch.tensor([float(rank + offset)]))
    return distributed.rank(), value.sum().item()


def _fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise UserError("rank one is wrong")
    distributed.barrier()


def _die(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(3)
    distributed.barrier()


def _hang(rank: int, world: int) -> None:
    time.sleep(60 * rank)


def test_results_come_in_rank_order():
    assert run_ranks(partial(_sum, 10), 3) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_an_exception_of_one_rank_is_raised_with_its_traceback():
    with pytest.raises(UserError, match="rank one is wrong") as caught:
        run_ranks(_fail_on_one, 2)
    assert "_fail_on_one" in str(caught.value.__cause__)


def test_a_rank_that_dies_or_hangs_is_reported():
    with pytest.raises((RankError, RuntimeError)):
        run_ranks(_die, 2)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_ranks(_hang, 2, timeout_s=3.0)


def test_gather_keeps_type_and_sums_gradients():
    for leaf_gradient, kept in run_ranks(_gathered, 2):
        assert leaf_gradient == [2.0, 2.0]
        assert kept == [True, False, True, False]


def _gathered(rank: int, world: int) -> tuple[list[float], list[bool]]:
    x = torch.ones(2, requires_grad=True)
    distributed.all_gather(x).sum().backward()
    assert x.grad is not None
    kept = distributed.all_gather(torch.tensor([True, False]))
    assert kept.dtype == torch.bool
    return x.grad.tolist(), kept.tolist()
