"""Shards cut anew, with smaller pictures: what is decoded every epoch is then decoded cheaply (perf/loader.py)."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from clipkit.data.build import Sample, tracked, write_shard
from clipkit.data.members import Unreadable, negative_pictures, picture_bytes, read_sheet
from clipkit.data.shards import Index, write_atomic
from clipkit.errors import UserError

RECIPE = "reshard.json"


@dataclass(frozen=True)
class Recipe:
    """Everything that the new shards depend on; `fingerprint` is the old ones'."""

    fingerprint: str
    short_side: int
    per_shard: int
    quality: int
    name: str


@dataclass
class Report:
    """What was done."""

    shards: int = 0
    kept: int = 0
    """Shards that an earlier call had finished."""
    samples: int = 0
    smaller: int = 0
    """Pictures that were made smaller; the others are copied byte for byte."""
    skipped: Counter[str] = field(default_factory=Counter)


def reshard(
    shards: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    short_side: int = 256,
    per_shard: int = 1000,
    quality: int = 95,
    name: str = "shard",
    on_error: Literal["raise", "skip"] = "raise",
    workers: int = 2,
    progress: bool = True,
) -> Report:
    """Write OUT/NAME-000000.tar, ... with `per_shard` pairs each, in the old order, whatever `workers`.

    Pictures whose short side exceeds `short_side` pixels are reduced to it (bicubic, antialiased) and stored as JPEG;
    captions, negatives and everything else in KEY.json stay. Shards finished by an earlier call with the same settings
    are kept. Raises UserError for an unreadable pair (unless `on_error` is "skip") and for a folder made otherwise.
    """
    index = Index.load(shards, on_error=on_error)
    recipe = Recipe(index.fingerprint, short_side, per_shard, quality, name)
    folder = Path(out)
    _claim(folder, recipe)
    jobs = [range(first, min(first + per_shard, len(index))) for first in range(0, len(index), per_shard)]
    work = partial(_write, index, folder, recipe, on_error)
    report = Report()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        done = pool.map(work, range(len(jobs)), jobs)
        for one in tracked(done, "resharding", len(jobs)) if progress else done:
            report.shards += one.shards
            report.kept += one.kept
            report.samples += one.samples
            report.smaller += one.smaller
            report.skipped.update(one.skipped)
    return report


def _claim(folder: Path, recipe: Recipe) -> None:
    """Note in OUT what it holds; refuse a folder that holds something else."""
    note = folder / RECIPE
    if note.is_file():
        kept = json.loads(note.read_text())
        changed = [f"{k}: {kept.get(k)} there, {v} now" for k, v in asdict(recipe).items() if kept.get(k) != v]
        if changed:
            raise UserError(f"{folder}: holds shards made otherwise ({'; '.join(changed)}); choose another folder")
    elif any(folder.glob(f"{recipe.name}-[0-9]*.tar")):
        raise UserError(f"{folder}: holds shards called {recipe.name}-* already; choose another folder or name")
    else:
        write_atomic(note, json.dumps(asdict(recipe), indent=1).encode())


def _write(index: Index, folder: Path, recipe: Recipe, on_error: str, number: int, ids: range) -> Report:
    path, report = folder / f"{recipe.name}-{number:06d}.tar", Report(shards=1)
    if path.is_file():
        report.kept = 1
        return report
    write_shard(_samples(index, recipe, on_error, ids, report), path)
    return report


def _samples(index: Index, recipe: Recipe, on_error: str, ids: range, report: Report) -> Iterator[Sample]:
    repeated = {key for key, times in Counter(map(index.key, ids)).items() if times > 1}
    for id in ids:
        try:
            members = index.read(id)
            sheet = read_sheet(members)
            suffix, data = picture_bytes(members)
            smaller = _reduced(data, recipe)
            negatives = dict(_negative(*member, recipe) for member in negative_pictures(members).items())
        except Unreadable as reason:
            if on_error == "raise":
                raise UserError(f"{index.where(id)}: {reason}; mend the shard, or skip what is unreadable") from None
            report.skipped[str(reason).partition(":")[0]] += 1
            continue
        key = index.key(id)
        if key in repeated:  # two old shards number their pairs alike
            key = f"{index.shards[index.locate(id)[0]].stem}/{key}"
        extra: dict[str, Any] = {**sheet.extra, "negatives": sheet.negatives or None, "group": sheet.group}
        extra = {name: value for name, value in extra.items() if value is not None}
        report.samples += 1
        report.smaller += smaller is not None
        yield Sample(key, smaller or data, "jpg" if smaller else suffix, sheet.captions, extra, negatives)


def _negative(suffix: str, data: bytes, recipe: Recipe) -> tuple[str, bytes]:
    smaller = _reduced(data, recipe)
    return (suffix, data) if smaller is None else (f"{suffix.partition('.')[0]}.jpg", smaller)


def _reduced(data: bytes, recipe: Recipe) -> bytes | None:
    """The picture at the wanted short side as JPEG; None where it is no larger. Raises Unreadable."""
    from PIL import Image

    from clipkit.data.decode import read_pixels
    from clipkit.data.resize import resize

    pixels = read_pixels(data)
    height, width = pixels.shape[1:]
    short = min(height, width)
    if short <= recipe.short_side:
        return None
    height, width = (max(1, round(side * recipe.short_side / short)) for side in (height, width))
    pixels = resize(pixels, height, width, "bicubic")
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=recipe.quality)
    return buffer.getvalue()
