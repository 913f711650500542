"""What is remembered of single samples: sharded by id, the same for any number of ranks, undone row by row."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.objective import samples
from clipkit.objective.samples import SampleTable
from tests.ranks import run_ranks

LIKE = torch.empty(0, dtype=torch.float64)


def put(table: SampleTable, ids: list[int], u: list[float], tau: list[float] | None = None) -> None:
    id, values = torch.tensor(ids), torch.tensor(u, dtype=torch.float64)
    table.read(id, LIKE)
    table.write(id, {"u": values, "tau": values * 10 if tau is None else torch.tensor(tau, dtype=torch.float64)})


def look(table: SampleTable, ids: list[int]) -> dict[str, list[float]]:
    return {name: x.nan_to_num(nan=-1.0).tolist() for name, x in table.read(torch.tensor(ids), LIKE).items()}


def test_two_samples_have_two_rows_and_others_none():
    table = SampleTable("u", "tau")
    assert look(table, [3, 0]) == {"u": [-1, -1], "tau": [-1, -1]}
    put(table, [5, 2], [0.5, 0.25])
    assert look(table, [2, 5, 4, 900]) == {"u": [0.25, 0.5, -1, -1], "tau": [2.5, 5, -1, -1]}


def test_a_sample_that_comes_up_twice_is_written_once():
    """The mean of what its rows say, wherever they stand."""
    table = SampleTable("u", "tau")
    put(table, [7, 1, 7, 7], [1.0, 2.0, 3.0, 8.0], [1.0, 1.0, 0.0, 0.5])
    assert look(table, [7, 1, 7]) == {"u": [4, 2, 4], "tau": [0.5, 1, 0.5]}


def test_undone_are_the_rows_last_written():
    table = SampleTable("u", "tau")
    put(table, [0, 4], [1.0, 2.0])
    put(table, [4, 4, 1, 50], [5.0, 6.0, 7.0, 8.0])
    table.undo()
    assert look(table, [0, 1, 4, 50])["u"] == [1, -1, 2, -1]
    table.undo()
    assert look(table, [0, 4])["u"] == [1, 2], "only one batch can be taken back"
    first = SampleTable("u", "tau")
    put(first, [3], [1.0])
    first.undo()
    assert look(first, [3])["u"] == [-1] and first.state() == {}


def test_other_columns_are_refused():
    table = SampleTable("u", "tau")
    put(table, [1], [1.0])
    with pytest.raises(UserError, match="keeps tau, u of each sample where u are asked for.*model.start"):
        SampleTable("u").load_state(table.state())


def test_taken_back_it_is_a_copy_and_nothing_is_left_of_before():
    table, other = SampleTable("u", "tau"), SampleTable("u", "tau")
    put(table, [1, 3], [1.0, 2.0])
    put(other, [0, 9], [5.0, 6.0])
    state = table.state()
    other.load_state(state)
    other.undo()
    put(other, [1], [9.0])
    assert look(other, [0, 1, 3, 9])["u"] == [-1, 9, 2, -1] and state["u"][1] == 1.0
    other.load_state({})
    assert look(other, [1, 3])["u"] == [-1, -1]


def story(rank: int, world: int, state: dict[str, Tensor] | None = None) -> tuple[list[Any], dict[str, Tensor], int]:
    """Rows written, some twice, some undone: what is read at each step, the state at the end, the rows held."""
    generator, found = torch.Generator().manual_seed(0), []
    table = SampleTable("u", "tau")
    if state is not None:
        table.load_state(state)
    for step in range(6):
        ids = torch.randint(0, 4 * (step + 1), (5,), generator=generator).tolist()
        found.append(look(table, ids))
        put(table, ids, torch.rand(5, generator=generator).tolist())
        if step == 3:
            table.undo()
        found.append(look(table, list(range(10))))
    return found, table.state(), len(table._rows)


def test_ranks_share_the_rows(monkeypatch: pytest.MonkeyPatch):
    """Two and four ranks read what one does, hold a part of it, and go on from each other's state."""
    monkeypatch.setattr(samples, "CHUNK", 4)
    alone = story(0, 1)
    state = alone[1]
    assert len(state["u"]) > 15 and state["u"].isnan().any()
    two = run_ranks(story, 2)
    assert [found for found, _, _ in two] == [alone[0]] * 2
    torch.testing.assert_close(two[0][1], state, rtol=0, atol=0, equal_nan=True)
    assert two[1][1] == {} and all(rows < alone[2] for _, _, rows in two)
    again = story(0, 1, two[0][1])
    four = run_ranks(partial(story, state=two[0][1]), 4)
    assert [found for found, _, _ in four] == [again[0]] * 4 and again[0] != alone[0]
    torch.testing.assert_close(four[0][1], again[1], rtol=0, atol=0, equal_nan=True)
