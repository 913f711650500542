"""Pictures that are alike, found by a model: the `alternates` that `data.alternates` draws from. Axes: n pairs, d.

NegCLIP (arXiv 2210.01936) takes each picture's nearest pictures. NV-Retriever (arXiv 2407.15831) leaves out what is too
good to be false: candidates whose score with the query is above a share of the positive's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from clipkit.data.build import tracked
from clipkit.data.members import read_sheet
from clipkit.data.shards import Index, expand
from clipkit.errors import UserError
from clipkit.negatives.make import check_free, check_places, rewrite
from clipkit.negatives.scoring import Model, read_pair

By = Literal["image", "text"]
ROWS = 1024
"""Pairs compared with all others at once."""


@dataclass(frozen=True)
class Embedded:
    """Unit vectors of all pairs' pictures, and of their captions: the mean of each pair's, at unit length: n d."""

    image: np.ndarray
    text: np.ndarray
    keys: list[str]
    groups: np.ndarray
    """Equal numbers show the same picture: n."""


@dataclass
class Mined:
    """What was found: pairs, those with a neighbour, and candidates left out as too good to be false."""

    pairs: int = 0
    covered: int = 0
    too_good: int = 0


def neighbours(found: Embedded, count: int, by: By = "image", at_most: float = 0.0) -> tuple[list[list[int]], int]:
    """The rows of each pair's `count` nearest others, the nearest first; and how many nearer ones were left out.

    `by`: their pictures' cosine with the pair's picture, or with its caption. With `at_most`, a candidate must have at
    most that share of the cosine that the pair's own picture has with its caption (NV-Retriever's TopK-PercPos: 0.95).
    No other pair of the same picture is one.
    """
    queries = found.image if by == "image" else found.text
    own = np.einsum("nd,nd->n", found.text, found.image)
    rows: list[list[int]] = []
    left_out = 0
    for first in range(0, len(queries), ROWS):
        part = slice(first, first + ROWS)
        near = queries[part] @ found.image.T
        near[found.groups[part, None] == found.groups] = -np.inf
        if at_most:
            too_good = (found.text[part] @ found.image.T > at_most * own[part, None]) & (near > -np.inf)
            kept = np.where(too_good, -np.inf, near)
            worst = np.sort(kept, 1)[:, -min(count, kept.shape[1])]
            left_out += int((too_good & (near >= worst[:, None])).sum())
            near = kept
        order = np.argsort(-near, axis=1, kind="stable")[:, :count]
        rows += [[int(j) for j in some if near[i, j] > -np.inf] for i, some in enumerate(order)]
    return rows, left_out


def mine(
    model: Model,
    shards: str | Path | Sequence[str | Path],
    out: Path,
    *,
    count: int = 3,
    by: By = "image",
    at_most: float = 0.0,
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool = True,
) -> Mined:
    """Write every shard again, to `out`, with the keys of each pair's nearest others as `alternates` in KEY.json.

    A pair without any gets its nearest picture of all, whatever `at_most` says, as every pair must name one. Raises
    UserError for shards that are there, a key in two shards, an unreadable pair, and where no other picture is.
    """
    paths = expand(shards)
    check_places(paths, out)
    if not overwrite:
        check_free(paths, out)
    index = Index.load(shards, progress=progress)
    index.ids()  # refuses a key of two pairs: alternates are keys
    found = embed_pairs(model, index, batch_size, progress)
    if len(set(found.groups.tolist())) < 2:
        raise UserError(f"{', '.join(map(str, paths[:3]))}: all pairs show one picture; there is none like another")
    rows, left_out = neighbours(found, count, by, at_most)
    nearest, _ = neighbours(found, 1, by)
    report = Mined(len(rows), sum(map(bool, rows)), left_out)
    names = iter([[found.keys[j] for j in some or nearest[i]] for i, some in enumerate(rows)])
    for path in paths:
        rewrite(path, out / path.name, lambda members: _sheet(members, next(names)))
    return report


def embed_pairs(model: Model, index: Index, batch_size: int = 64, progress: bool = True) -> Embedded:
    """Embed every pair. Raises UserError for an unreadable one."""
    images, texts, groups, ids = [], [], [], iter(range(len(index)))
    batches = -(-len(index) // batch_size)
    for _ in tracked(range(batches), "embedding pairs", batches) if progress else range(batches):
        some = [read_pair(index, id) for id in islice(ids, batch_size)]
        images.append(np.asarray(model.embed_images([picture for picture, _ in some]), np.float32))
        usable = [[sheet.captions[c] for c in sheet.usable()] for _, sheet in some]
        each = np.asarray(model.embed_texts([text for captions in usable for text in captions]), np.float32)
        ends = np.cumsum([0, *map(len, usable)])
        means = np.stack([each[a:b].mean(0) for a, b in pairwise(ends)])
        texts.append(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12))
        groups += [sheet.group for _, sheet in some]
    keys = [index.key(id) for id in range(len(index))]
    names = {name: number for number, name in enumerate(dict.fromkeys(g for g in groups if g is not None))}
    numbers = [-1 - names[g] if g is not None else row for row, g in enumerate(groups)]
    return Embedded(np.concatenate(images), np.concatenate(texts), keys, np.array(numbers))


def _sheet(members: dict[str, bytes], alternates: list[str]) -> bytes:
    """KEY.json with the names of similar pairs."""
    record = json.loads(members["json"]) if "json" in members else {"captions": read_sheet(members).captions}
    return json.dumps(record | {"alternates": alternates}, ensure_ascii=False).encode()
