"""Parquet files, read and written in pieces. pyarrow is an extra: `pip install 'clipkit[sets]'`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from clipkit.errors import UserError

PIECE = 10_000
"""Rows of a row group that is written."""


def arrow() -> Any:
    """pyarrow, with its parquet module. Raises UserError where it is not installed."""
    try:
        import pyarrow  # type: ignore[import-not-found]
        import pyarrow.parquet  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'clipkit[sets]'") from None
    return pyarrow


def open_file(file: Path) -> Any:
    """A ParquetFile. Raises UserError for what is none."""
    parquet = arrow().parquet
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable parquet file: {error}") from None


def rows(table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of an open file, a few hundred in memory at once."""
    for batch in table.iter_batches(batch_size=256, columns=columns):
        yield from batch.to_pylist()


def write(file: Path, fields: dict[str, str], lines: Iterable[dict[str, Any]]) -> None:
    """Rows with the fields (name -> arrow type, say `string`), piece by piece; the file is whole or not there."""
    pyarrow = arrow()
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in fields.items()])
    part, waiting = file.with_name(f".{file.name}.{os.getpid()}"), iter(lines)
    try:
        with pyarrow.parquet.ParquetWriter(part, schema, compression="zstd") as out:
            while piece := list(islice(waiting, PIECE)):
                out.write_table(pyarrow.Table.from_pylist(piece, schema=schema))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
