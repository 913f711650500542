"""Results for people (a table on a terminal, tab-separated otherwise) and for programs (JSON)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

STDOUT = "-"


def write_json(value: Any, path: str) -> None:
    """`value` as JSON into the file `path`, whole or not at all; `-` is standard output."""
    text = _sayable(json.dumps(value, indent=1, ensure_ascii=False)) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
        return
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Rows on standard output; numbers stand right-aligned."""
    if not sys.stdout.isatty():
        for row in [columns, *rows]:
            print(*(_sayable(cell) for cell in row), sep="\t")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        numeric = all(isinstance(row[number], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_sayable(cell)) for cell in row))
    Console().print(table)


def print_tables(tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]]) -> None:
    """(title, columns, rows) each, a blank line between them where nothing is drawn."""
    for number, (title, columns, rows) in enumerate(tables):
        if number and not sys.stdout.isatty():
            print()
        print_table(columns, rows, title)


def says_first(text: str) -> bool:
    """Whether no other rank on this machine has said the same.

    A mistake in the config is found by all of them at once, before they have met. torchrun gives each a place for its
    error, in a folder that it removes in the end.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    said = Path(own).parent.parent / f"said_{blake2b(text.encode(errors='replace'), digest_size=8).hexdigest()}"
    try:
        if own:
            said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no such folder: better twice than not at all
        pass
    return True


def _sayable(value: Any) -> str:
    """As text; halves of surrogate pairs, which captions and names in tars can hold and no output takes, become ?."""
    return str(value).encode(errors="replace").decode()
