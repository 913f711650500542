"""Pictures of negatives that somebody drew or generated: a table of them into the shards.

`wishes` lists what is to be drawn, one JSON object a line; the same lines with a `picture` each are what `attach` reads
(TripletCLIP, arXiv 2411.02545; generative negative mining, arXiv 2311.03964).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.data.build import encode_jpeg
from clipkit.data.decode import read_picture
from clipkit.data.members import PICTURES, Unreadable, negative_pictures, read_sheet
from clipkit.data.shards import Index, expand, write_atomic
from clipkit.errors import UserError
from clipkit.negatives.make import check_free, check_places, rewrite

SOURCE = "generated"
"""The `source` of negatives that came with their picture."""


@dataclass
class Attached:
    """What was done: pictures put beside negatives that were there, and negatives that came with theirs."""

    shards: int = 0
    known: int = 0
    new: int = 0


def wishes(shards: str | Path | Sequence[str | Path], file: Path, kinds: Sequence[str] = ()) -> int:
    """List every negative (of some kinds) without a picture: {"key", "caption", "kind", "text", "picture"}; how many.

    `picture` is a name that nothing else has, for who draws it. Blank negatives are never drawn, nor listed. Raises
    UserError for an unreadable pair and for a key in two shards.
    """
    index, lines = Index.load(shards), []
    index.ids()  # refuses a key of two pairs: rows name pairs by it
    for id in range(len(index)):
        try:
            sheet = read_sheet(index.read(id))
        except Unreadable as reason:
            raise UserError(f"{index.where(id)}: {reason}; mend the shard (clipkit shards check)") from None
        key = index.key(id)
        for c, caption in enumerate(sheet.captions):
            for place, negative in enumerate(sheet.negatives_of(c)):
                kind = str(negative.get("kind") or "")
                if "picture" in negative or not negative["text"].strip() or (kinds and kind not in kinds):
                    continue
                row = {"key": key, "caption": caption, "kind": kind, "text": negative["text"]}
                lines.append(json.dumps(row | {"picture": f"{key}.{c}.{place}.png"}, ensure_ascii=False))
    write_atomic(file, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def attach(shards: str | Path | Sequence[str | Path], table: Path, out: Path, *, overwrite: bool = False) -> Attached:
    """Write every shard again, to `out`, with the table's pictures as KEY.negativeJ.jpg, named by their negatives.

    Rows (JSONL or CSV): `key`, `text` (the negative), `picture` (a file, from the table's folder), and, where the text
    is not among the pair's negatives, `caption` (default: its first) and `kind` of the negative that it becomes. A
    negative that has a picture keeps it. Raises UserError for a row that fits nothing, is blank or says what a caption
    of its picture says, for an unreadable picture, for a key in two shards, and for shards that are there.
    """
    rows = _rows(table)
    paths = expand(shards)
    check_places(paths, out)
    if not overwrite:
        check_free(paths, out)
    index = Index.load(shards)
    keys = list(index.ids())
    if strangers := rows.keys() - set(keys):
        raise UserError(f"{table}: {sorted(strangers)[0]}: no pair of the shards has this key")
    report, at = Attached(), iter(keys)
    for path in paths:
        rewrite(path, out / path.name, lambda members: _sheet(members, rows.get(next(at), []), table, report))
        report.shards += 1
    return report


Row = tuple[int, dict[str, Any]]
"""Number of the line, and its fields."""


def _rows(table: Path) -> dict[str, list[Row]]:
    """The rows by key. Raises UserError for a table that is none."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{table}: cannot be read: {error}") from None
    lines: list[Row] = []
    if table.suffix.lower() in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
        lines = list(enumerate(reader, start=2))
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                lines += [(number, json.loads(line))] if line.strip() else []
            except ValueError as error:
                raise UserError(f"{table}: line {number}: not JSON: {error}") from None
    found: dict[str, list[Row]] = {}
    for number, row in lines:
        lacking = [
            n for n in ("key", "text", "picture") if not isinstance(row, dict) or not isinstance(row.get(n), str)
        ]
        if lacking:
            raise UserError(f"{table}: line {number}: needs key, text and picture; without {lacking[0]}")
        if not row["text"].strip():
            raise UserError(f"{table}: line {number}: the text is blank, and no negative; leave the line out")
        found.setdefault(row["key"], []).append((number, row))
    if not found:
        raise UserError(f"{table}: names no picture")
    return found


def _sheet(members: dict[str, bytes], rows: list[Row], table: Path, report: Attached) -> bytes:
    """KEY.json that names the pictures, which join the members."""
    sheet = read_sheet(members)
    groups = [list(sheet.negatives_of(c)) for c in range(len(sheet.captions))]
    for number, row in rows:
        place = f"{table}: line {number}"
        same = [n for group in groups for n in group if n["text"] == row["text"]]
        if not same:
            caption = row.get("caption") or sheet.captions[sheet.usable()[0]]
            if caption not in sheet.captions:
                raise UserError(f"{place}: {row['key']} has no caption {caption!r:.80}")
            if row["text"].strip() in sheet.captions:
                raise UserError(
                    f"{place}: {row['text']!r:.80} is a caption of {row['key']}, and no negative; change it"
                )
            same = [{"text": row["text"], "kind": row.get("kind") or SOURCE, "source": SOURCE}]
            groups[sheet.captions.index(caption)] += same
            report.new += 1
        elif all("picture" in negative for negative in same):
            continue
        else:
            report.known += 1
        picture = _add(members, table.parent / row["picture"], place)
        for negative in same:
            negative.setdefault("picture", picture)
    record = json.loads(members["json"]) if "json" in members else {}
    return json.dumps(record | {"captions": sheet.captions, "negatives": groups}, ensure_ascii=False).encode()


def _add(members: dict[str, bytes], file: Path, place: str) -> int:
    """Put a picture among the members; its number."""
    try:
        data = file.read_bytes()
        picture = read_picture(data)
    except OSError as error:
        raise UserError(f"{place}: {file}: {error.strerror or error}") from None
    except Unreadable as reason:
        raise UserError(f"{place}: {file}: {reason}") from None
    suffix = file.suffix.lower().lstrip(".")
    if suffix not in PICTURES:
        suffix, data = "jpg", encode_jpeg(picture, quality=95)
    taken = {
        int(name.removeprefix("negative").partition(".")[0]) for name in negative_pictures(members) if _numbered(name)
    }
    number = max(taken, default=-1) + 1
    members[f"negative{number}.{suffix}"] = data
    return number


def _numbered(name: str) -> bool:
    return name.removeprefix("negative").partition(".")[0].isdigit()
