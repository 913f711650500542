"""A model's embeddings into shards: what reads them later needs neither the model nor its time. Axes: d embedding."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from clipkit.data.build import tracked, write_members
from clipkit.data.decode import read_picture
from clipkit.data.members import Sheet, Unreadable, picture_bytes, read_sheet
from clipkit.data.shards import Index, write_atomic
from clipkit.data.stored import MEMBER
from clipkit.errors import UserError, did_you_mean
from clipkit.model.dual_encoder import DualEncoder

LEDGER = ".embed.json"
"""What the shards of a folder were made of."""
PARTS = ("text", "negatives", "image")


@dataclass(frozen=True)
class Recipe:
    """Everything that the new shards depend on; `fingerprint` is the old ones'."""

    fingerprint: str
    model: str
    name: str
    parts: list[str]


@dataclass
class Report:
    """What was done."""

    shards: int = 0
    kept: int = 0
    """Shards that an earlier call had finished."""
    pairs: int = 0


def embed_shards(
    model: DualEncoder,
    shards: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    name: str,
    parts: Sequence[str] = ("text",),
    reference: str = "",
    batch_size: int = 64,
    progress: bool = True,
) -> Report:
    """Write every shard again to the folder `out`, with KEY.NAME.text.npy and its like beside what is there.

    `parts`: of which to write members, text (captions), negatives and image; float16, unit length, pictures as in
    evaluation. `batch_size` pairs are embedded at once. Shards finished by an earlier call with the same settings are
    kept. Raises UserError for an unreadable pair and for a folder that was made otherwise.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts {part}: no such part{did_you_mean(part, PARTS)}")
    if not MEMBER.fullmatch(f"{name}.text.npy"):
        raise UserError(f"--name {name}: should be letters, digits, _ and -")
    index = Index.load(shards)
    targets = _targets(index, Path(out))
    recipe = Recipe(index.fingerprint, reference, name, sorted(parts))
    _claim(Path(out), recipe)
    report = Report()
    starts = np.concatenate([[0], np.cumsum(index.counts)]).tolist()
    jobs = list(zip(targets, map(range, starts, starts[1:])))
    for target, ids in tracked(jobs, "embedding shards", len(jobs)) if progress else jobs:
        report.shards += 1
        if target.is_file():
            report.kept += 1
            continue
        write_members(_pairs(model, index, ids, recipe, batch_size, report), target)
    return report


def _targets(index: Index, out: Path) -> list[Path]:
    names = [shard.name if shard.name.endswith(".tar") else f"{shard.name}.tar" for shard in index.shards]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"{twice[0]}: two of the shards are called so, and would become one in {out}; name fewer")
    folders = {shard.resolve() for shard in index.shards if isinstance(shard, Path)}
    if any((out / name).resolve() in folders for name in names):
        raise UserError(f"{out}: holds the shards that are read; choose another folder")
    return [out / name for name in names]


def _claim(out: Path, recipe: Recipe) -> None:
    """Note in OUT what it holds; refuse a folder that holds something else."""
    out.mkdir(parents=True, exist_ok=True)
    note = out / LEDGER
    if note.is_file():
        kept = json.loads(note.read_text())
        changed = [f"{k}: {kept.get(k)} there, {v} now" for k, v in asdict(recipe).items() if kept.get(k) != v]
        if changed:
            raise UserError(f"{out}: holds shards made otherwise ({'; '.join(changed)}); choose another folder")
    elif any(out.glob("*.tar")):
        raise UserError(f"{out}: holds other shards already; choose another folder")
    else:
        write_atomic(note, json.dumps(asdict(recipe), indent=1).encode())


@dataclass
class _Pair:
    key: str
    members: dict[str, bytes]
    sheet: Sheet
    picture: Image.Image | None

    def texts(self, part: str) -> list[str]:
        """The captions, or the negatives of all captions, in the order of their rows."""
        if part == "text":
            return self.sheet.captions
        return [negative["text"] for group in self.sheet.negatives for negative in group]


def _pairs(
    model: DualEncoder, index: Index, ids: range, recipe: Recipe, batch_size: int, report: Report
) -> Iterator[dict[str, Any]]:
    """The members of every pair, the new ones behind the old."""
    waiting = iter(ids)
    while some := [_read(index, id, "image" in recipe.parts) for id in islice(waiting, batch_size)]:
        made = {part: _embedded(model, part, some) for part in recipe.parts}
        for row, pair in enumerate(some):
            arrays = {f"{recipe.name}.{part}.npy": _npy(tables[row]) for part, tables in made.items()}
            report.pairs += 1
            yield {"__key__": pair.key, **pair.members, **arrays}


def _read(index: Index, id: int, pictures: bool) -> _Pair:
    try:
        members = index.read(id)
        picture = read_picture(picture_bytes(members)[1]) if pictures else None
        return _Pair(index.key(id), members, read_sheet(members), picture)
    except Unreadable as reason:
        raise UserError(f"{index.where(id)}: {reason}; mend the shard (clipkit shards check)") from None


def _embedded(model: DualEncoder, part: str, pairs: list[_Pair]) -> list[Tensor]:
    """Of every pair: [d] of the picture, or a row for each text [texts d]."""
    if part == "image":
        return list(model.embed_images([pair.picture for pair in pairs]))
    texts = [pair.texts(part) for pair in pairs]
    every = model.embed_texts([text for some in texts for text in some])
    return list(every.split([len(some) for some in texts]))


def _npy(rows: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, rows.half().numpy(), allow_pickle=False)
    return file.getvalue()
