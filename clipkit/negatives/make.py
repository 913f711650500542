"""Shards in, the same shards with rule negatives out: parallel over shards, resumable, the same for any `workers`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

from clipkit.data.build import tracked
from clipkit.data.members import SHEETS, Sheet, Unreadable, read_sheet
from clipkit.data.shards import Index, Shard, expand, version, write_atomic
from clipkit.errors import UserError
from clipkit.negatives.filters import Usage, keep, usage_of
from clipkit.negatives.wordnet import installed
from clipkit.registry import RULES

KINDS = ("reshuffle", "swap_nouns", "swap_adjectives", "replace_adjectives", "replace_nouns")
"""DeGLA's five kinds, made by default."""
SOURCE = "rule"
"""The `source` of every negative made here; negatives from elsewhere stay in the shard."""
CAPTION_ROWS, NEGATIVE_ROWS = ".text.npy", ".negatives.npy"
"""How members with embeddings end that have a row for each caption, or negative (docs/shards.md)."""
LEDGER = ".negatives"
"""Folder beside the shards with what is known of each finished one."""


@dataclass
class Report:
    """What was made. `kinds` counts negatives, `covered` captions with at least one (of a kind, or "any").

    `drops` counts candidates dropped and `empty` captions that offered nothing, each by kind and reason.
    """

    captions: int = 0
    covered: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    drops: dict[str, Counter[str]] = field(default_factory=dict)
    empty: dict[str, Counter[str]] = field(default_factory=dict)
    shards: int = 0
    kept_shards: int = 0
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """Share of captions with at least one negative."""
        return self.covered["any"] / self.captions if self.captions else 0.0

    def add(self, other: Report) -> None:
        """Count another report in."""
        self.captions += other.captions
        self.shards += other.shards
        self.covered.update(other.covered)
        self.kinds.update(other.kinds)
        for mine, theirs in ((self.drops, other.drops), (self.empty, other.empty)):
            for kind, reasons in theirs.items():
                mine.setdefault(kind, Counter()).update(reasons)

    def to_json(self) -> dict[str, Any]:
        """Plain names and numbers; `share` included."""
        return vars(self) | {"share": round(self.share, 4)}

    def rows(self) -> list[tuple[str, int, str, str]]:
        """(kind, negatives, share of captions covered, what was dropped) for a table."""
        rows = []
        for kind in sorted({*self.kinds, *self.drops, *self.empty}):
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.drops.get(kind, Counter()).most_common())
            rows.append((kind, self.kinds[kind], f"{self.covered[kind] / max(self.captions, 1):.1%}", reasons))
        rows.append(("any", sum(self.kinds.values()), f"{self.share:.1%}", ""))
        return rows


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which negatives a caption gets, besides the caption and its siblings."""

    kinds: tuple[str, ...]
    per_kind: int
    seed: int
    usage: Usage | None = None


def make(
    shards: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    kinds: Sequence[str] | None = None,
    per_kind: int = 1,
    seed: int = 0,
    usual: int = 0,
    workers: int = 2,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Write every shard again, to `out`, with up to `per_kind` negatives of each kind for every caption in KEY.json.

    Pictures and texts are copied byte for byte; negatives of another source stay. What a caption gets depends on it,
    on the other captions of the picture, the kinds and the seed: not on workers or shards. With `usual` it depends on
    all captions: a negative with two neighbouring words that fewer of them hold could be told without its picture, and
    is dropped. A shard finished by an earlier call with the same settings is kept, one by a call with others replaced.
    Raises UserError for an unknown kind, for shards of one name, for a shard that is there and not by `make` (unless
    `overwrite`) and for an unreadable sheet.
    """
    for kind in kinds or KINDS:
        RULES.entry(kind)
    folder, started = Path(out), time.perf_counter()
    paths = expand(shards)
    check_places(paths, folder)
    if not overwrite:
        check_own(paths, folder, SOURCE)
    usage = usage_of(captions_of(shards), usual) if usual else None
    recipe = Recipe(tuple(kinds or KINDS), per_kind, seed, usage)
    jobs = [(path, folder / path.name, recipe) for path in paths]
    total = Report()
    pending = []
    for job in jobs:
        finished = finished_before(job[1], _stamp(*job))
        if finished:
            total.add(finished)
            total.kept_shards += 1
        else:
            pending.append(job)
    done = _run(pending, workers)
    for report in tracked(done, "making negatives", len(pending)) if progress else done:
        total.add(report)
    total.seconds = time.perf_counter() - started
    return total


def negatives(
    caption: str, recipe: Recipe, siblings: Sequence[str] = (), report: Report | None = None
) -> list[dict[str, Any]]:
    """The negatives of one caption: {"text", "kind", "source", "seed"} each, by kind; `report` counts them."""
    report = report if report is not None else Report()
    report.captions += 1
    taken: set[str] = set()
    found: list[dict[str, Any]] = []
    for kind in recipe.kinds:
        candidates = RULES[kind](caption, Random(f"{recipe.seed}:{kind}:{caption}"))
        drops = report.drops.setdefault(kind, Counter())
        texts = keep(
            candidates, caption, kind, limit=recipe.per_kind, siblings=siblings, usage=recipe.usage, taken=taken,
            drops=drops,
        )  # fmt: skip
        if texts:
            report.covered[kind] += 1
            report.kinds[kind] += len(texts)
        else:
            reason = candidates.reason or "every candidate dropped"
            report.empty.setdefault(kind, Counter())[reason] += 1
        found += [{"text": text, "kind": kind, "source": SOURCE, "seed": recipe.seed} for text in texts]
    report.covered["any"] += bool(found)
    return found


def captions_of(shards: str | Path | Sequence[str | Path]) -> Iterator[str]:
    """Every caption; unreadable sheets are passed over: whoever writes the shard names them."""
    index = Index.load(shards)
    for id in range(len(index)):
        with suppress(Unreadable):
            yield from read_sheet(index.read(id, SHEETS)).captions


def check_places(paths: Sequence[Shard], folder: Path) -> None:
    """Raises UserError when these shards cannot be written to `folder` under their own names."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file, and shards go to a folder; choose another --out")
    names = Counter(path.name for path in paths)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: {names[twice[0]]} shards have this name; go folder by folder")
    for path in paths:
        if isinstance(path, Path) and path.resolve() == (folder / path.name).resolve():
            raise UserError(f"{folder}: the shards themselves lie here; choose another folder")


def check_free(paths: Sequence[Shard], folder: Path) -> None:
    """Raises UserError for a shard that is in `folder` already."""
    for target in (folder / path.name for path in paths):
        if target.exists():
            raise UserError(f"{target}: is there already; choose another folder or --overwrite")


def check_own(paths: Sequence[Shard], folder: Path, by: str) -> None:
    """Raises UserError for a shard that is in `folder` already and is not, as it stands, what `by` wrote there."""
    for target in (folder / path.name for path in paths):
        if not target.exists():
            continue
        stamp = json.loads(_ledger(target).read_text())["stamp"] if _ledger(target).is_file() else {}
        if stamp.get("by") != by or stamp.get("size", target.stat().st_size) != target.stat().st_size:
            raise UserError(
                f"{target}: is there already, and something else wrote it; choose another folder "
                "or --overwrite (its negatives would be lost)"
            )


def _run(jobs: list[tuple[Shard, Path, Recipe]], workers: int) -> Iterator[Report]:
    """Reports of shards as they are finished."""
    if workers == 1 or len(jobs) < 2:
        yield from map(_make_shard, jobs)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    # Started afresh, not forked: the caller may hold threads (a trainer, a progress bar).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        for future in as_completed([pool.submit(_make_shard, job) for job in jobs]):
            yield future.result()


def _make_shard(job: tuple[Shard, Path, Recipe]) -> Report:
    """Write one shard and its line in the ledger."""
    source, target, recipe = job
    report = Report(shards=1)
    claim(target, SOURCE)
    rewrite(source, target, lambda members: _sheet(members, recipe, report))
    finish(target, _stamp(source, target, recipe), report)
    return report


def rewrite(source: Shard, target: Path, sheet: Callable[[dict[str, bytes]], bytes]) -> None:
    """Copy a shard, pair by pair and byte for byte but for KEY.json, which `sheet` makes of a pair's members.

    Where captions or negatives are others then, embeddings of those from before are left out. Raises UserError where
    `sheet` raises Unreadable; `target` is there whole or not at all.
    """
    index = Index.load(source, progress=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for id in range(len(index)):
                before = index.read(id)
                members = dict(before)
                try:
                    members["json"] = sheet(members)
                    members = _fresh(before, members)
                except Unreadable as error:
                    raise UserError(f"{index.where(id)}: {error}; mend the shard (clipkit shards check)") from None
                _write(tar, index.key(id), members)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _fresh(before: dict[str, bytes], after: dict[str, bytes]) -> dict[str, bytes]:
    """The members after a change, without embeddings of captions or negatives that are others now."""
    if not any(suffix.endswith((CAPTION_ROWS, NEGATIVE_ROWS)) for suffix in after):
        return after
    old, new = read_sheet(before), read_sheet(after)
    stale = (CAPTION_ROWS,) * (old.captions != new.captions) + (NEGATIVE_ROWS,) * (_texts(old) != _texts(new))
    return {suffix: data for suffix, data in after.items() if not suffix.endswith(stale)}


def _texts(sheet: Sheet) -> list[str]:
    """All negatives of a pair, those of the first caption first."""
    return [negative["text"] for group in sheet.negatives for negative in group]


def _sheet(members: dict[str, bytes], recipe: Recipe, report: Report) -> bytes:
    """KEY.json with the negatives of every caption."""
    sheet = read_sheet(members)
    made = []
    for c, caption in enumerate(sheet.captions):
        foreign = [n for n in sheet.negatives_of(c) if n.get("source") != SOURCE]
        siblings = sheet.captions[:c] + sheet.captions[c + 1 :]
        made.append(foreign + (negatives(caption, recipe, siblings, report) if caption else []))
    record = json.loads(members["json"]) if "json" in members else {}
    return json.dumps(record | {"captions": sheet.captions, "negatives": made}, ensure_ascii=False).encode()


def _write(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for suffix, data in members.items():
        entry = tarfile.TarInfo(f"{key}.{suffix}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))


def _ledger(target: Path) -> Path:
    return target.parent / LEDGER / f"{target.name}.json"


def claim(target: Path, by: str) -> None:
    """Note who is about to write a shard: it is theirs even if they are killed before they `finish` it."""
    write_atomic(_ledger(target), json.dumps({"stamp": {"by": by}, "report": {}}).encode())


def finish(target: Path, stamp: dict[str, Any], report: Report) -> None:
    """Write a finished shard's line in the ledger."""
    write_atomic(_ledger(target), json.dumps({"stamp": stamp, "report": report.to_json()}).encode())


def finished_before(target: Path, stamp: dict[str, Any]) -> Report | None:
    """The report of a shard that an earlier call finished with this stamp."""
    file = _ledger(target)
    if not file.is_file() or not target.is_file():
        return None
    entry = json.loads(file.read_text())
    if entry["stamp"] != stamp:
        return None
    known = entry["report"]
    return Report(
        captions=known["captions"],
        covered=Counter(known["covered"]),
        kinds=Counter(known["kinds"]),
        drops={kind: Counter(reasons) for kind, reasons in known["drops"].items()},
        empty={kind: Counter(reasons) for kind, reasons in known["empty"].items()},
        shards=1,
    )


def _stamp(source: Shard, target: Path, recipe: Recipe) -> dict[str, Any]:
    """What a finished shard was made from, and how."""
    usage = recipe.usage.mark if recipe.usage else ""
    settings = {"by": SOURCE, "kinds": list(recipe.kinds), "per_kind": recipe.per_kind, "seed": recipe.seed}
    settings["usage"] = usage
    if "replace_nouns_wordnet" in recipe.kinds:
        found = installed()
        settings["wordnet"] = found.mark if found else ""
    return settings | {"rules": rules_mark(), **sizes(source, target)}


def sizes(source: Shard, target: Path) -> dict[str, Any]:
    """What a stamp says of the files: which version was read, how large what was written is."""
    return {"source": version(source), "size": target.stat().st_size if target.is_file() else -1}


@cache
def rules_mark() -> str:
    """Changes with the rules and their word lists, so that shards made by older ones are made again."""
    folder = resources.files("clipkit.negatives")
    files = [entry for place in (folder, folder / "data") for entry in place.iterdir() if entry.is_file()]
    mark = hashlib.blake2b(digest_size=8)
    for entry in sorted(files, key=lambda file: file.name):
        mark.update(entry.read_bytes())
    return mark.hexdigest()
