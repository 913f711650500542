"""Answers for very many pictures into a table on disk, batch by batch; an interrupted call is gone on with.

Beside FILE lies `.FILE.about`: what the answers are of, and how many bytes of the rows are whole batches. Whatever was
written beyond that when a call was killed is cut off, so the rows end as if it had not been.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64
from PIL import Image

from clipkit.data.shards import write_atomic
from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation import parquet
from clipkit.evaluation.embed import watched
from clipkit.evaluation.result import digest
from clipkit.evaluation.zeroshot import Answers, load_picture


def write_answers(
    answers: Answers, pictures: Iterable[Path], file: Path, *, about: str = "", progress: bool = False
) -> dict[str, int]:
    """Add a row for each picture to `file` (.csv, .jsonl or .parquet), those in it left out; returns what was done.

    A picture that cannot be read gets a row with its `error`. `about`, say the model's name, is part of what the rows
    are of, with classes, prompts and settings; raises UserError where the file is of something else. Memory does not
    grow with the number of pictures, but for eight bytes of each that is there already. Parquet is written at the end,
    from rows that stay beside it as `.FILE.jsonl`.
    """
    form = FORMS.get(file.suffix)
    if form is None:
        raise UserError(f"--out {file}: should end in {', '.join(FORMS)}{did_you_mean(file.suffix, FORMS)}")
    if file.suffix == ".parquet":
        parquet.arrow()  # its absence is said before the work
    rows = Rows(file, form, answers, about)
    found = {"pictures": 0, "there already": 0, "unreadable": 0}
    known = _known(form.names(rows.file))
    asked: list[Asked] = []

    def waiting() -> Iterator[Asked]:
        for picture in pictures:
            found["pictures"] += 1
            if _there(str(picture), known):
                found["there already"] += 1
            else:
                asked.append(Asked(picture))
                yield asked[-1]

    with rows:
        for batch in watched(answers.embed(waiting(), Asked.load), None, "embedding pictures", progress):
            some, asked[:] = asked[: len(batch)], asked[len(batch) :]
            found["unreadable"] += sum(bool(one.problem) for one in some)
            rows.add(
                [(str(a.picture), [] if a.problem else best, a.problem) for a, best in zip(some, answers.of(batch))]
            )
    if file.suffix == ".parquet":
        parquet.write(file, _fields(answers.top), map(_flat, read_answers(rows.file)))
    return found


@dataclass(eq=False)
class Asked:
    """A picture under way, and why it cannot be read."""

    picture: Path
    problem: str = ""

    def load(self) -> Image.Image:
        """The picture, or anything in its place."""
        try:
            return load_picture(self.picture)
        except UserError as error:
            self.problem = str(error)
            return Image.new("RGB", (8, 8))


def read_answers(file: Path) -> Iterator[dict[str, Any]]:
    """{"image", "classes", "error" where there is one} of every row of an --out file, one at a time."""
    rows = _rows_of(file)
    if not rows.is_file():
        raise UserError(f"{rows}: no such file")
    yield from FORMS[rows.suffix].rows(rows)


class Rows:
    """The rows on the disk: grows by whole batches; see the module."""

    def __init__(self, file: Path, form: type[Jsonl] | type[Csv], answers: Answers, about: str):
        self.file, self.form, self.top = _rows_of(file), form, answers.top
        self._note = file.with_name(f".{file.name}.about")
        self._of = digest(
            repr((about, answers.labels, answers.prompts, answers.top, answers.none_below, answers.scale))
        )
        if self.file.is_file() and self.file.stat().st_size:
            try:
                note = json.loads(self._note.read_text())
            except (OSError, ValueError):
                note = {}
            if not isinstance(note, dict) or note.get("of") != self._of:
                raise UserError(
                    f"{file}: holds answers of another model, other classes or settings; choose another file"
                )
            _cut(self.file, note["bytes"])
        else:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.file, b"")
            self._commit()

    def __enter__(self) -> Rows:
        self._out = self.file.open("ab")
        if not self._out.tell():
            self._out.write(self.form.head(self.top).encode())
        return self

    def __exit__(self, *error: object) -> None:
        self._out.close()
        if error[0] is None:
            self._commit()

    def add(self, rows: list[tuple[str, list[dict[str, Any]], str]]) -> None:
        """A batch of (picture, its best classes, what went wrong)."""
        text = "".join(self.form.line(*row[:2], self.top, row[2]) for row in rows)
        self._out.write(text.encode(errors="surrogateescape"))  # names of files that are no UTF-8
        self._out.flush()
        self._commit()

    def _commit(self) -> None:
        write_atomic(self._note, json.dumps({"of": self._of, "bytes": self.file.stat().st_size}).encode())


def _cut(file: Path, whole: int) -> None:
    """Leave the first `whole` bytes, of which a file that lost some keeps its whole lines."""
    if (size := file.stat().st_size) < whole:
        with file.open("rb") as lines:
            whole = size - next((len(line) for line in lines if not line.endswith(b"\n")), 0)
    os.truncate(file, whole)


def _rows_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.jsonl") if file.suffix == ".parquet" else file


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")


def _known(names: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    """Sorted hashes: of ten million names 80 MB, where the names themselves would take a gigabyte."""
    return np.unique(np.fromiter((_key(name) for name in names), np.uint64))


def _there(name: str, known: UInt64[np.ndarray, " n"]) -> bool:
    key = np.uint64(_key(name))
    at = int(np.searchsorted(known, key))
    return at < len(known) and known[at] == key


class Jsonl:
    """{"image", "classes": [{"class", "probability", "similarity"}], "error" where there is one} a line."""

    @staticmethod
    def head(top: int) -> str:
        return ""

    @staticmethod
    def line(image: str, ranked: list[dict[str, Any]], top: int, problem: str) -> str:
        row = {"image": image, "classes": ranked} | ({"error": problem} if problem else {})
        text = json.dumps(row, ensure_ascii=False)
        return (text if text.isprintable() else json.dumps(row)) + "\n"  # halves of surrogate pairs are escaped

    @staticmethod
    def rows(file: Path) -> Iterator[dict[str, Any]]:
        with file.open(encoding="utf-8") if file.is_file() else io.StringIO() as lines:
            yield from map(json.loads, lines)

    @classmethod
    def names(cls, file: Path) -> Iterator[str]:
        """The pictures in the file."""
        return (row["image"] for row in cls.rows(file))


class Csv:
    """image, class, probability, similarity, class_2, ..., error."""

    @staticmethod
    def head(top: int) -> str:
        return _csv(list(_fields(top)))

    @staticmethod
    def line(image: str, ranked: list[dict[str, Any]], top: int, problem: str) -> str:
        cells = [one[what] for one in ranked for what in COLUMNS]
        return _csv([image, *cells, *[""] * (len(COLUMNS) * top - len(cells)), problem])

    @staticmethod
    def rows(file: Path) -> Iterator[dict[str, Any]]:
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
            for row in csv.DictReader(lines):
                best = [{what: row[f"{what}{n}"] for what in COLUMNS} for n in _ranks((len(row) - 2) // len(COLUMNS))]
                classes = [
                    {"class": one["class"]} | {what: float(one[what]) for what in COLUMNS[1:]}
                    for one in best
                    if one["class"]
                ]
                yield {"image": row["image"], "classes": classes} | ({"error": row["error"]} if row["error"] else {})

    @classmethod
    def names(cls, file: Path) -> Iterator[str]:
        """The pictures in the file."""
        return (row["image"] for row in cls.rows(file))


COLUMNS = ("class", "probability", "similarity")
FORMS: dict[str, type[Jsonl] | type[Csv]] = {".csv": Csv, ".jsonl": Jsonl, ".parquet": Jsonl}
"""Ending of the file -> the form of its rows while they grow."""


def _ranks(top: int) -> list[str]:
    return ["", *(f"_{n}" for n in range(2, top + 1))]


def _fields(top: int) -> dict[str, str]:
    """Columns of a flat table, and the arrow type of each."""
    kinds = dict(zip(COLUMNS, ("string", "float32", "float32"), strict=True))
    ranked = {f"{what}{n}": kind for n in _ranks(top) for what, kind in kinds.items()}
    return {"image": "string"} | ranked | {"error": "string"}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `read_answers` under the names of `_fields`."""
    ranked = zip(_ranks(len(row["classes"])), row["classes"])
    cells = {f"{what}{n}": one[what] for n, one in ranked for what in COLUMNS}
    name = row["image"].encode(errors="replace").decode()
    return {"image": name, "error": row.get("error")} | cells


def _csv(cells: list[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()
