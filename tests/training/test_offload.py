"""Moments, fp32 weights and divided weights in the host's memory: the run of one process, whatever lies where."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clipkit import config as configuration
from clipkit import distributed
from clipkit.errors import UserError
from clipkit.model.pieces import load_table
from clipkit.training import zero
from clipkit.training.checkpoint import whole_checkpoints
from clipkit.training.engine import Engine
from clipkit.training.loop import train
from tests.ranks import run_ranks
from tests.training.runs import losses, weights, whole_and_cut

KINDS: list[dict[str, Any]] = [
    {"zero_stage": 1, "offload": "optimizer"},
    {"zero_stage": 2, "offload": "optimizer", "accumulate": 2},
    {"zero_stage": 3, "offload": "optimizer"},
    {"zero_stage": 3, "offload": "all", "accumulate": 2},
]


def _runs(tree: dict, rank: int, world: int) -> list[tuple[Path, Path]]:
    zero.RESIDENT = 0
    Engine.close = lambda _: distributed.barrier()  # type: ignore[method-assign]  # the group of ranks is the test's
    found = []
    for number, engine in enumerate(KINDS):
        each = tree | {"engine": {"kind": "deepspeed"} | engine, "out": tree["out"].replace("{", f"{number}/{{")}
        found.append(whole_and_cut(each | {"save_form": ("full", "sharded")[number % 2]}, rank, world))
    return found


def test_losses_are_those_of_one_process(tiny_tree: dict) -> None:
    """And a run that is taken up again ends with the same bits."""
    tree = tiny_tree | {"samples": 64, "save_every": 32, "keep": 9, "optim": {"lr": 1e-3, "eps": 1e-3}}
    alone = train(configuration.validate(tree | {"name": "alone"}))
    for kind, (peace, again) in zip(KINDS, run_ranks(partial(_runs, tree), 2, timeout_s=300)[0]):
        assert losses(peace) == pytest.approx(losses(alone), abs=1e-5), kind
        assert losses(again) == losses(peace)
        for name in ("model", "optimizer", "teacher"):
            want, got = (load_table(whole_checkpoints(run)[-1], name) for run in (peace, again))
            assert want.keys() == got.keys() == weights(alone, name).keys()
            assert all(value.equal(got[key]) for key, value in want.items()), (kind, name)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"kind": "fsdp", "offload": "optimizer"}, "belongs to engine.kind: deepspeed, got fsdp"),
        (
            {"kind": "deepspeed", "zero_stage": 0, "offload": "optimizer"},
            "zero_stage: 0 divides nothing; use 1, 2 or 3",
        ),
        ({"kind": "deepspeed", "zero_stage": 2, "offload": "all"}, "all moves divided weights, zero_stage: 2 keeps"),
    ],
)
def test_what_cannot_be_moved_is_refused(engine: dict, said: str) -> None:
    with pytest.raises(UserError, match=f"engine.offload: .*{said}"):
        configuration.validate({"engine": engine})
