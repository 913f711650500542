"""Readers of what people have: each yields `Sample`s from a path; keyword-only arguments are its settings (`--set`).

JPEG and PNG files are copied byte for byte; other pictures (WebP, BMP, GIF) become JPEG.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from clipkit.data.build import Sample, encode_jpeg
from clipkit.data.members import Unreadable, negative_pictures, picture_bytes, read_sheet
from clipkit.errors import UserError, did_you_mean
from clipkit.registry import SOURCES, source

Missing = Literal["raise", "skip"]
"""What happens where a caption's picture file is not there."""
Record = dict[str, Any]

PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
IMAGE_COLUMNS = ("filepath", "file_name", "filename", "image", "image_path", "img", "path")
CAPTION_COLUMNS = ("captions", "caption", "text", "title", "sentence")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv", "captions.tsv", "captions.json")


def guess(path: Path) -> str:
    """The source that fits the path's shape. Raises UserError when none does."""
    if path.is_dir():
        return "tar" if any(path.glob("*.tar")) else "folder"
    by_suffix = {".tar": "tar", ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "coco"}
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() not in by_suffix:
        raise UserError(f"{path}: cannot tell what this holds; say --from {' | '.join(SOURCES)}")
    return by_suffix[path.suffix.lower()]


@source()
def folder(path: Path, *, captions: str = "", missing: Missing = "raise") -> Iterator[Sample]:
    """Pictures in a folder: each beside a .txt of its name (one caption a line), or named by a captions file.

    `captions`: a CSV, TSV, JSONL or COCO JSON file (relative to the folder); by default captions.* or metadata.*.
    """
    named = [path / captions] if captions else [path / name for name in CAPTION_FILES if (path / name).is_file()]
    if named:
        if not named[0].is_file():
            raise UserError(f"{named[0]}: no such captions file")
        form = guess(named[0])
        extra = {"images": str(path)} if form == "coco" else {}
        return SOURCES[form](named[0], missing=missing, **extra)
    return _pictures_beside_texts(path)


@source(name="csv")
def csv_file(
    path: Path, *, image: str = "", caption: str = "", separator: str = "", missing: Missing = "raise"
) -> Iterator[Sample]:
    """A table with a picture column (paths from the table's folder) and a caption column; a picture's rows are joined.

    `image`, `caption`: the columns' names; `separator`: a tab or a comma. All are found by themselves where not given.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter=separator or ("\t" if "\t" in head else ","))
        rows = [(number, row) for number, row in enumerate(reader, start=2)]
    return _records(path, rows, image, caption, missing)


@source()
def jsonl(path: Path, *, image: str = "", caption: str = "", missing: Missing = "raise") -> Iterator[Sample]:
    """One JSON object a line with a picture path and a caption or list of captions; other fields are kept.

    `image`, `caption`: the fields' names, found by themselves where not given.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            rows.append((number, _json_object(path, number, line)))
    return _records(path, rows, image, caption, missing)


@source()
def coco(path: Path, *, images: str = "", missing: Missing = "raise") -> Iterator[Sample]:
    """COCO captions JSON ({"images": [...], "annotations": [...]}); every caption of a picture is kept.

    `images`: the folder of the pictures; by default the annotation file's folder.
    """
    tree = _json(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict) or not {"images", "annotations"} <= tree.keys():
        raise UserError(f'{path}: not COCO captions: should hold "images" and "annotations"')
    captions: dict[Any, list[str]] = {}
    for annotation in tree["annotations"]:
        if "caption" not in annotation:
            raise UserError(f"{path}: annotations without captions (take captions_*.json, not instances_*.json)")
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    root = Path(images) if images else path.parent
    for record in tree["images"]:
        texts = [text for text in captions.get(record["id"], []) if text]
        file = root / record["file_name"]
        if texts and _present(file, missing, f"{path}: image {record['id']}"):
            kept = {name: record[name] for name in ("id", "license", "coco_url", "flickr_url") if name in record}
            yield _sample(
                Path(record["file_name"]).with_suffix("").as_posix(), file.read_bytes(), texts, kept, str(file)
            )


@source()
def tar(path: Path, *, on_error: Literal["raise", "skip"] = "raise") -> Iterator[Sample]:
    """Existing shards (a tar, or a folder of them): pictures, captions, JSON fields; other members are left out.

    `on_error: skip` leaves pairs out that cannot be read.
    """
    from clipkit.data.shards import Index

    index = Index.load(path, on_error=on_error)
    for id in range(len(index)):
        try:
            members = index.read(id)
            sheet = read_sheet(members)
            image = picture_bytes(members)[1]
        except Unreadable as reason:
            if on_error == "raise":
                raise UserError(f"{path}: {index.where(id)}: {reason}; --set on_error=skip leaves it out") from None
            continue
        extra = dict(sheet.extra)
        if sheet.negatives:
            extra["negatives"] = sheet.negatives
        if sheet.group is not None:
            extra["group"] = sheet.group
        sample = _sample(index.key(id), image, sheet.captions, extra, index.where(id))
        sample.negative_images = negative_pictures(members)
        yield sample


def _pictures_beside_texts(root: Path) -> Iterator[Sample]:
    for file in sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURE_FILES):
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise UserError(
                f"{file}: no caption: there is no {text.name} beside it, and no captions file "
                f"({', '.join(CAPTION_FILES)}) in {root}"
            )
        captions = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not captions:
            raise UserError(f"{text}: is empty")
        yield _sample(file.relative_to(root).with_suffix("").as_posix(), file.read_bytes(), captions, {}, str(file))


def _records(
    path: Path, rows: list[tuple[int, Record]], image: str, caption: str, missing: Missing
) -> Iterator[Sample]:
    """Rows (line number, fields) → one sample a picture, in order of first mention."""
    if not rows:
        raise UserError(f"{path}: no rows")
    image = _column(path, rows[0][1], image, IMAGE_COLUMNS, "image")
    caption = _column(path, rows[0][1], caption, CAPTION_COLUMNS, "caption")
    pictures: dict[str, list[tuple[int, Record]]] = {}
    for number, row in rows:
        if not row.get(image):
            raise UserError(f"{path}: line {number}: no {image}")
        pictures.setdefault(str(row[image]), []).append((number, row))
    for name, group in pictures.items():
        captions = [text for number, row in group for text in _texts(path, number, row.get(caption))]
        extra = {k: v for k, v in group[0][1].items() if k not in (image, caption) and k is not None}
        file = path.parent / name
        if _present(file, missing, f"{path}: line {group[0][0]}"):
            yield _sample(Path(name).with_suffix("").as_posix(), file.read_bytes(), captions, extra, str(file))


def _column(path: Path, row: Record, given: str, usual: tuple[str, ...], setting: str) -> str:
    if given:
        if given not in row:
            raise UserError(f"{path}: no column {given}{did_you_mean(given, row)}")
        return given
    found = [name for name in usual if name in row]
    if not found:
        raise UserError(
            f"{path}: which column is the {setting}? Say --set {setting}=NAME; found {', '.join(map(str, row))}"
        )
    return found[0]


def _texts(path: Path, number: int, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"{path}: line {number}: should have a caption (or a list of them), found {value!r:.80}")
    return [text.strip() for text in texts]


def _json_object(path: Path, number: int, line: str) -> Record:
    record = _json(line, f"{path}: line {number}")
    if not isinstance(record, dict):
        raise UserError(f"{path}: line {number}: should be an object with fields, found {line!r:.80}")
    return record


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from None


def _present(file: Path, missing: Missing, where: str) -> bool:
    if file.is_file():
        return True
    if missing == "raise":
        raise UserError(f"{where}: no picture {file}; --set missing=skip leaves such rows out")
    return False


def _sample(key: str, data: bytes, captions: list[str], extra: Record, where: str) -> Sample:
    if data.startswith(b"\xff\xd8\xff"):
        return Sample(key, data, "jpg", captions, extra)
    if data.startswith(b"\x89PNG\r\n"):
        return Sample(key, data, "png", captions, extra)
    from clipkit.data.decode import read_picture

    try:
        return Sample(key, encode_jpeg(read_picture(data), quality=95), "jpg", captions, extra)
    except Unreadable as reason:
        raise UserError(f"{where}: {reason}") from None
