"""What is in shards, in numbers: one pass over captions and headers of pictures, in memory that hardly grows.

Of ten million captions their hashes are kept (8 bytes each, for repetitions), of everything else only histograms.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clipkit.data.build import tracked
from clipkit.data.decode import FORMATS
from clipkit.data.members import Sheet, Unreadable, picture_bytes, read_sheet
from clipkit.data.pace import pace
from clipkit.data.reader import group_number
from clipkit.data.repeats import Repeats, hash_of
from clipkit.data.shards import Index
from clipkit.data.storage import stamp
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError

CHUNK = 256
"""Pairs that a worker reads at a time."""
CONTEXT = 77
"""Tokens of CLIP's text tower, start and end included; longer captions are cut."""
UNCUT = 1 << 20
QUANTILES = (0.05, 0.5, 0.95, 0.99)


@dataclass
class Tally:
    """Counts over some pairs. Histograms map a value to how often it comes."""

    unreadable: Counter[str] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)
    """Of captions a pair; likewise below."""
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    negatives: Counter[int] = field(default_factory=Counter)
    """Of negatives a caption."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Negatives of each kind."""
    covered: Counter[str] = field(default_factory=Counter)
    """Captions with at least one negative of the kind."""
    formats: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    aspects: Counter[float] = field(default_factory=Counter)
    """Width over height, to two decimals."""
    kilobytes: Counter[int] = field(default_factory=Counter)
    """Of encoded pictures, rounded."""
    picture_bytes: int = 0
    ids: list[int] = field(default_factory=list)
    """Pairs that could be read; beside them the numbers of their groups, hashes of their pictures and captions."""
    groups: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another tally's histograms in."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
        self.picture_bytes += other.picture_bytes


def statistics(
    patterns: str | Path | Sequence[str | Path],
    *,
    sample: int | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Numbers about the shards, or about `sample` pairs chosen by `seed`; JSON-able, named as the tables name them.

    Pictures are not decoded (that is `check_shards`), except those that the time of an epoch is estimated with.
    Raises UserError when no pair can be read.
    """
    index = Index.load(patterns, on_error="skip", progress=progress)
    ids: Sequence[int] = range(len(index))
    if sample is not None and sample < len(index):
        ids = sorted(Random(seed).sample(ids, sample))
    tally, repeats = Tally(), Repeats()
    for part in _tallies(index, ids, workers, progress):
        tally.add(part)
        repeats.add(part.ids, part.groups, part.pictures, part.texts)
    if not repeats.pairs:
        raise UserError(f"{index.shards[0]}: no pair of {len(ids)} can be read; `clipkit shards check` says why")
    negatives = max(tally.negatives)
    return {
        "shards": len(index.shards),
        "bytes": sum(stamp(shard)["size"] for shard in index.shards),
        "pairs": len(index),
        "sample": None if isinstance(ids, range) else {"pairs": len(ids), "seed": seed},
        "unreadable": dict(tally.unreadable),
        **_summary(tally),
        "groups": repeats.groups(),
        "repeats": {"captions": repeats.captions(index), "pictures": repeats.pictures(index)},
        "epoch": pace(index, workers=workers, negatives=min(4, negatives), seed=seed),
    }


def spread(histogram: Counter[Any]) -> dict[str, float]:
    """Mean, least, greatest and quantiles of what a histogram counts (the smallest value that enough do not exceed)."""
    values = np.array(sorted(histogram))
    counts = np.array([histogram[value] for value in values.tolist()])
    places = np.searchsorted(np.cumsum(counts), np.array(QUANTILES) * counts.sum())
    out = {"mean": round(float(np.average(values, weights=counts)), 3), "least": values[0].item()}
    out |= {f"q{round(100 * q)}": values[place].item() for q, place in zip(QUANTILES, places)}
    return out | {"greatest": values[-1].item()}


class _Jobs(Dataset):
    """Number of a chunk of the ids → its tally."""

    def __init__(self, index: Index, ids: Sequence[int], tokenizer: Tokenizer):
        self.index, self.ids, self.tokenizer = index, ids, tokenizer

    def __len__(self) -> int:
        return -(-len(self.ids) // CHUNK)

    def __getitem__(self, number: int) -> Tally:
        tally = Tally()
        for id in self.ids[number * CHUNK : (number + 1) * CHUNK]:
            try:
                _count(tally, self.index.read(id), id, self.tokenizer)
            except Unreadable as reason:
                tally.unreadable[str(reason).partition(":")[0]] += 1
        return tally


def _tallies(index: Index, ids: Sequence[int], workers: int, progress: bool) -> Iterator[Tally]:
    jobs = _Jobs(index, ids, Tokenizer(context_length=UNCUT))
    # The workers are the loader's: forked where that is possible, so that they do not import the tokenizer's library.
    done = DataLoader(jobs, batch_size=None, num_workers=min(workers, len(jobs)))
    yield from tracked(done, "counting", len(jobs)) if progress else done


def _count(tally: Tally, members: dict[str, bytes], id: int, tokenizer: Tokenizer) -> None:
    """Count a pair in, or nothing of it. Raises Unreadable."""
    sheet = read_sheet(members)
    picture = picture_bytes(members)[1]
    kind, width, height = _header(picture)
    tally.formats[kind] += 1
    tally.widths[width] += 1
    tally.heights[height] += 1
    tally.aspects[round(width / height, 2)] += 1
    tally.kilobytes[round(len(picture) / 1000)] += 1
    tally.picture_bytes += len(picture)
    tally.ids.append(id)
    tally.groups.append(group_number(sheet, id) if sheet.group is not None else 0)
    tally.pictures.append(hash_of(picture))
    tally.texts.append(_count_captions(tally, sheet, tokenizer))


def _count_captions(tally: Tally, sheet: Sheet, tokenizer: Tokenizer) -> list[int]:
    """Count the captions of a pair in → their hashes."""
    usable = sheet.usable()
    tally.captions[len(usable)] += 1
    for c in usable:
        text = sheet.captions[c]
        tally.words[len(text.split())] += 1
        tally.tokens[tokenizer([text]).shape[1]] += 1
        kinds = Counter(str(n.get("kind") or "") for n in sheet.negatives_of(c) if n["text"].strip())
        tally.negatives[kinds.total()] += 1
        tally.kinds.update(kinds)
        tally.covered.update(kinds.keys())
    return [hash_of(sheet.captions[c]) for c in usable]


def _header(data: bytes) -> tuple[str, int, int]:
    """(format, width, height) without decoding. Raises Unreadable."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise Unreadable(f"unreadable picture: {type(error).__name__}: {error}") from None
    return picture.format or "", *picture.size


def _summary(tally: Tally) -> dict[str, Any]:
    captions = tally.words.total()
    beyond = sum(times for length, times in tally.tokens.items() if length > CONTEXT)
    return {
        "captions": {
            "count": captions,
            "a_pair": spread(tally.captions),
            "words": spread(tally.words),
            "tokens": spread(tally.tokens),
            "beyond_context": {"context": CONTEXT, "count": beyond, "share": beyond / captions},
        },
        "negatives": {
            "count": sum(tally.kinds.values()),
            "a_caption": spread(tally.negatives),
            "captions_without": tally.negatives[0],
            "kinds": {
                kind: {"count": times, "captions": tally.covered[kind], "share": tally.covered[kind] / captions}
                for kind, times in tally.kinds.most_common()
            },
        },
        "pictures": {
            "formats": dict(tally.formats.most_common()),
            "width": spread(tally.widths),
            "height": spread(tally.heights),
            "aspect": spread(tally.aspects),
            "kilobytes": spread(tally.kilobytes),
            "bytes": tally.picture_bytes,
        },
    }
