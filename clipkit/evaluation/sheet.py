"""Answers for very many pictures into a table on disk, batch by batch; an interrupted call is gone on with."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.data.shards import write_atomic
from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.embed import watched
from clipkit.evaluation.result import digest
from clipkit.evaluation.zeroshot import Answers, load_picture


def write_answers(
    answers: Answers, pictures: list[Path], file: Path, *, about: str = "", progress: bool = False
) -> dict[str, int]:
    """Append a row for each picture to `file` (.csv or .jsonl), those in it left out; returns what was done.

    A picture that cannot be read gets a row with its `error`. Beside the file, `.NAME.about` holds what it is of
    (`about`, say the model's name, with classes, prompts and settings). Raises UserError where that is something else.
    """
    form = FORMS.get(file.suffix)
    if form is None:
        raise UserError(f"--out {file}: should end in {' or '.join(FORMS)}{did_you_mean(file.suffix, FORMS)}")
    _claim(file, digest(repr((about, answers.labels, answers.prompts, answers.top, answers.none_below))))
    done = form.names(file)
    waiting = [picture for picture in pictures if str(picture) not in done]
    problems: dict[Path, str] = {}

    def load(picture: Path) -> Image.Image:
        try:
            return load_picture(picture)
        except UserError as error:
            problems[picture] = str(error)
            return Image.new("RGB", (8, 8))

    at = 0
    with file.open("a", newline="", encoding="utf-8") as out:
        if not out.tell():
            out.write(form.head(answers.top))
        for rows in watched(answers.embed(waiting, load), len(waiting), "embedding pictures", progress):
            some = waiting[at : at + len(rows)]
            for picture, ranked in zip(some, answers.of(rows), strict=True):
                problem = problems.get(picture, "")
                out.write(form.line(str(picture), [] if problem else ranked, answers.top, problem))
            out.flush()
            at += len(rows)
    return {"pictures": len(pictures), "there already": len(pictures) - len(waiting), "unreadable": len(problems)}


def _claim(file: Path, of: str) -> None:
    note = file.with_name(f".{file.name}.about")
    if file.is_file() and file.stat().st_size:
        if not note.is_file() or note.read_text() != of:
            raise UserError(f"{file}: holds answers of another model, other classes or settings; choose another file")
        text = file.read_bytes()
        if not text.endswith(b"\n"):  # the row that was being written when the last call ended
            write_atomic(file, text[: text.rfind(b"\n") + 1])
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(note, of.encode())


class Jsonl:
    """{"image", "classes": [{"class", "probability", "similarity"}], "error" where there is one} a line."""

    @staticmethod
    def head(top: int) -> str:
        return ""

    @staticmethod
    def line(image: str, ranked: list[dict[str, Any]], top: int, problem: str) -> str:
        row = {"image": image, "classes": ranked} | ({"error": problem} if problem else {})
        return json.dumps(row, ensure_ascii=False) + "\n"

    @staticmethod
    def names(file: Path) -> set[str]:
        """The pictures in the file."""
        with file.open(encoding="utf-8") if file.is_file() else io.StringIO() as lines:
            return {json.loads(line)["image"] for line in lines}


class Csv:
    """image, class, probability, similarity, class_2, ..., error."""

    @staticmethod
    def head(top: int) -> str:
        ranks = ["", *(f"_{n}" for n in range(2, top + 1))]
        return _csv(["image", *(f"{what}{n}" for n in ranks for what in COLUMNS), "error"])

    @staticmethod
    def line(image: str, ranked: list[dict[str, Any]], top: int, problem: str) -> str:
        cells = [one[what] for one in ranked for what in COLUMNS]
        return _csv([image, *cells, *[""] * (len(COLUMNS) * top - len(cells)), problem])

    @staticmethod
    def names(file: Path) -> set[str]:
        """The pictures in the file."""
        with file.open(newline="", encoding="utf-8") if file.is_file() else io.StringIO() as lines:
            return {row["image"] for row in csv.DictReader(lines)}


COLUMNS = ("class", "probability", "similarity")
FORMS: dict[str, type[Jsonl] | type[Csv]] = {".csv": Csv, ".jsonl": Jsonl}


def _csv(cells: list[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([str(cell).replace("\n", " ") for cell in cells])
    return out.getvalue()
