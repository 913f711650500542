"""What terms remember of single samples, by dense id. Axes: n rows of the global batch, c columns, r rows held here."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UserError

CHUNK = 2**20
"""Rows of each rank that are brought together at a time for a checkpoint."""


class SampleTable:
    """Named float columns with a row for every sample, by dense id; a sample never written is NaN in all of them.

    Each rank holds the rows of every world-th id, on the device of the embeddings; it grows as larger ids come up. All
    ranks call each method together, with the ids of the global batch, as terms do.
    """

    def __init__(self, *columns: str):
        self.columns = columns
        self._rows: Float[Tensor, "r c"] = torch.empty(0, len(columns))
        self._before: tuple[Int64[Tensor, " _"], Float[Tensor, "_ c"]] | None = None

    def read(self, id: Int64[Tensor, " n"], like: Tensor) -> dict[str, Float[Tensor, " n"]]:
        """Each column for these samples, the same on every rank, in the type of `like`.

        Costs one all-reduce of n · c numbers; the host waits for the largest id.
        """
        self._hold(int(id.max()) + 1 if len(id) else 0, like)
        world = distributed.world_size()
        mine = id % world == distributed.rank()
        found = torch.where(mine[:, None], self._rows[id // world], 0.0)
        return dict(zip(self.columns, distributed.total(found).unbind(1)))

    def write(self, id: Int64[Tensor, " n"], values: dict[str, Float[Tensor, " n"]]) -> None:
        """Put down every column for the samples just read.

        A sample that comes up several times is written once, with the mean of what its rows say.
        """
        said = torch.stack([values[name].detach() for name in self.columns], 1)
        samples, place, count = id.unique(return_inverse=True, return_counts=True)
        means = said.new_zeros(len(samples), said.shape[1]).index_add(0, place, said) / count[:, None]
        world = distributed.world_size()
        mine = samples % world == distributed.rank()
        rows = samples[mine] // world
        self._before = rows, self._rows[rows]
        self._rows[rows] = means[mine]

    def undo(self) -> None:
        """Put back what the last `write` wrote over."""
        if self._before:
            rows, values = self._before
            self._rows[rows] = values
            self._before = None

    def state(self) -> dict[str, Float[Tensor, " _"]]:
        """Each column as one whole tensor by id, up to the last sample seen: at the main rank, nothing elsewhere."""
        parts = []
        for rows in self._rows.split(CHUNK):
            of_ranks = distributed.all_gather(rows[None])  # world r c
            if distributed.is_main():
                parts.append(of_ranks.transpose(0, 1).flatten(0, 1).cpu())
        table = torch.cat(parts) if parts else torch.empty(0, len(self.columns))
        seen = (~table.isnan()).any(1).nonzero()
        if not len(seen):
            return {}
        return {name: table[: int(seen.max()) + 1, i].contiguous() for i, name in enumerate(self.columns)}

    def load_state(self, state: dict[str, Float[Tensor, " _"]]) -> None:
        """Take back what `state` gave on any number of ranks. Raises UserError when the columns are others."""
        self._before = None
        self._rows = self._rows[:0]
        if not state:
            return
        if state.keys() != set(self.columns):
            raise UserError(
                f"objective: the checkpoint keeps {', '.join(sorted(state))} of each sample where "
                f"{', '.join(sorted(self.columns))} are asked for; leave the settings of its terms as they were, or "
                "start a new run with model.start"
            )
        table = torch.stack([state[name] for name in self.columns], 1)
        self._hold(len(table), table.to(self._rows.device))
        own = table[distributed.rank() :: distributed.world_size()]
        self._rows[: len(own)] = own.to(self._rows.device)

    def _hold(self, samples: int, like: Tensor) -> None:
        """Have room for ids below `samples`, the same number of rows on every rank."""
        self._rows = self._rows.to(like)
        needed = -(-samples // distributed.world_size())
        if needed > len(self._rows):
            more = needed + needed // 8 - len(self._rows)  # so that not every batch makes it grow
            self._rows = torch.cat([self._rows, self._rows.new_full((more, len(self.columns)), torch.nan)])
