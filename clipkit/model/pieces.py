"""Tables of tensors in pieces, in a file for each rank; every file says which numbers of which tensor it holds.

    model-00000-of-00002.safetensors   of every tensor a run of its numbers, flat; its header has, under `pieces`,
    model-00001-of-00002.safetensors   {tensor: [place of the first number, [shape of the whole]], ...} as JSON

Whoever reads puts them together: neither the engine nor the number of ranks that wrote them need be known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UserError
from clipkit.model.tables import write_table


class Piece(NamedTuple):
    """A run of a tensor's numbers."""

    values: Tensor
    """Flat."""
    start: int
    """Of its first number in the whole, flat."""
    shape: tuple[int, ...]
    """Of the whole."""


Layout = dict[str, tuple[int, tuple[int, ...]]]
"""Of each tensor: where the run begins, and the shape of the whole."""


def share(x: Any) -> Piece:
    """What this rank writes down of `x`: its own rows where ranks divide it, else an equal run; not copied."""
    rank, world = distributed.rank(), distributed.world_size()
    if hasattr(x, "to_local"):
        assert x.placements[0].is_shard(0), f"divided otherwise than by rows: {x.placements}"
        rows = min(rank * -(-x.shape[0] // world), x.shape[0])  # all parts but the last are as large
        return Piece(x.to_local().flatten(), rows * x.shape[1:].numel(), tuple(x.shape))
    start, end = (x.numel() * number // world for number in (rank, rank + 1))
    return Piece(x.flatten()[start:end], start, tuple(x.shape))


def save_pieces(values: dict[str, Tensor], layout: Layout, folder: Path, name: str) -> None:
    """Write this rank's file of the table `name`: flat `values`, and by `layout` where each begins in which shape."""
    file = folder / f"{name}-{distributed.rank():05d}-of-{distributed.world_size():05d}.safetensors"
    held = {key: x for key, x in values.items() if x.numel()}
    # One entry alone: safetensors writes several in random order, and equal tables should be equal files.
    write_table(held, file, metadata={"pieces": json.dumps({key: layout[key] for key in sorted(held)})})


def load_table(folder: Path, name: str) -> Mapping[str, Tensor]:
    """The table `name` of a checkpoint, whole: from its one file or put together; empty where it has none.

    Tensors are read when they are asked for. Raises UserError where a piece is missing.
    """
    whole = folder / f"{name}.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    if files and files != [whole] and (lost := _missing(files)):
        raise UserError(f"{folder}: {lost} is not there, a part of {name}; copy it again, or use another checkpoint")
    try:
        return load_file(whole) if files == [whole] else Assembled(files)  # a file is mapped into memory, not read
    except (SafetensorError, OSError) as error:
        mend = "copy it again, or use another checkpoint"
        raise UserError(f"{folder}: {name} cannot be read ({error}), damaged or half copied; {mend}") from None


def needed_table(folder: Path, name: str) -> Mapping[str, Tensor]:
    """`load_table`, with a UserError where there is none."""
    table = load_table(folder, name)
    if not table:
        raise UserError(f"{folder}: {name}.safetensors is not there; copy it again, or use another checkpoint")
    return table


class Assembled(Mapping[str, Tensor]):
    """Tensors put together from the files of all ranks, each anew when it is asked for: none is kept.

    Raises UserError where numbers of one are in no file.
    """

    def __init__(self, files: Sequence[Path]):
        self._shapes: dict[str, list[int]] = {}
        self._pieces: dict[str, list[tuple[Any, int]]] = {}
        found: dict[str, int] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            for key, (start, shape) in json.loads(file.metadata()["pieces"]).items():
                self._shapes[key] = shape
                self._pieces.setdefault(key, []).append((file, start))
                found[key] = found.get(key, 0) + file.get_slice(key).get_shape()[0]
        for key, shape in self._shapes.items():
            if found[key] != (total := torch.Size(shape).numel()):
                where = files[0].parent
                raise UserError(f"{where}: of {_table(files)}'s {key} {found[key]:,} of {total:,} numbers are there")

    def __getitem__(self, key: str) -> Tensor:
        pieces = [(file.get_tensor(key), start) for file, start in self._pieces[key]]
        flat = torch.empty(torch.Size(self._shapes[key]).numel(), dtype=pieces[0][0].dtype)
        for values, start in pieces:
            flat[start : start + values.numel()] = values
        return flat.view(self._shapes[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _table(files: Sequence[Path]) -> str:
    return files[0].name.split("-")[0]


def _missing(files: list[Path]) -> str:
    """The first file that should be beside these, by what their names say."""
    names = {file.name for file in files}
    prefix, count = re.fullmatch(r"(.*)-\d+-of-(\d+)\.safetensors", files[0].name).groups()  # type: ignore[union-attr]
    wanted = [f"{prefix}-{number:05d}-of-{count}.safetensors" for number in range(int(count))]
    return next((name for name in wanted if name not in names), "")
