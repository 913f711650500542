"""Rows into a batch: texts tokenised in one call, ragged lists padded and marked. Axes: n pairs, w places a pair,
v words of the vocabulary of tags, t tokens, s pixels, f features."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import default_collate

from clipkit.data.batch import Batch
from clipkit.data.reader import Row, kind_number
from clipkit.data.tags import vocabulary
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.settings import DataConfig

Ragged = list[list[Any]]
"""For each pair, what it has of something."""


def stack(rows: list[Row], data: DataConfig, tokenizer: Tokenizer, skipped: list[tuple[str, str]]) -> Batch:
    """The batch of `rows`, with as many places a pair as `data` asks for."""
    positives = [row.positives for row in rows]
    negatives = [[negative["text"] for negative in row.negatives] for row in rows]
    kinds = [[str(negative.get("kind", "")) for negative in row.negatives] for row in rows]
    text, positive_text, negative_text = _tokens(rows, positives, negatives, data, tokenizer)
    features = rows[0].picture.ndim == 1
    pictures = default_collate([row.picture for row in rows])  # in a worker straight into shared memory
    negative_pictures, pictured = _negative_pictures(rows, data.negative_images)
    return Batch(
        text=text,
        id=torch.tensor([row.id for row in rows]),
        group=torch.tensor([row.group for row in rows]),
        image=None if features else pictures,
        image_features=pictures if features else None,
        negative_text=negative_text,
        valid=_exist(negatives, data.negatives),
        negative_kind=_numbers(kinds, data.negatives),
        negative_weight=_weights(rows, data.negatives) if data.negative_weights else None,
        negative_image=negative_pictures,
        negative_image_valid=pictured,
        view_image=default_collate([torch.stack(row.views) for row in rows]) if data.views else None,
        positive_text=positive_text,
        positive_valid=_exist(positives, data.positives),
        relevance=torch.tensor([row.relevance for row in rows]),
        tags=_marked([row.tags for row in rows], len(vocabulary(data.tags))) if data.tags else None,
        label=torch.tensor([row.label for row in rows]) if data.labels else None,
        skipped=skipped,
        **_stored(rows, data),
        kinds={kind_number(kind): kind for row in kinds for kind in row},
    )


def _tokens(
    rows: list[Row], positives: Ragged, negatives: Ragged, data: DataConfig, tokenizer: Tokenizer
) -> tuple[Int64[Tensor, "n t"], Int64[Tensor, "n w t"] | None, Int64[Tensor, "n w t"] | None]:
    """Captions, positives, negatives; a place without a text holds zeros."""
    n, widths = len(rows), (data.positives, data.negatives)
    texts = [row.caption for row in rows]
    for ragged, width in zip((positives, negatives), widths):
        texts += [text for row in ragged for text in row + [""] * (width - len(row))]
    text, *tables = tokenizer(texts).split([n, *(n * width for width in widths)])
    for ragged, table in zip((positives, negatives), tables):
        empty = _exist(ragged, len(table) // n)
        if empty is not None:
            table[~empty.flatten()] = 0
    positive, negative = (table.unflatten(0, (n, width)) if width else None for table, width in zip(tables, widths))
    return text, positive, negative


def _exist(ragged: Ragged, width: int) -> Bool[Tensor, "n w"] | None:
    if not width:
        return None
    return torch.tensor([[place < len(row) for place in range(width)] for row in ragged])


def _numbers(kinds: Ragged, width: int) -> Int64[Tensor, "n w"] | None:
    if not width:
        return None
    return torch.tensor([[kind_number(kind) for kind in row] + [-1] * (width - len(row)) for row in kinds])


def _weights(rows: list[Row], width: int) -> Float[Tensor, "n w"]:
    found = [[float(negative.get("weight", 1.0)) for negative in row.negatives] for row in rows]
    return torch.tensor([row + [1.0] * (width - len(row)) for row in found])


def _marked(places: list[list[int]], width: int) -> Bool[Tensor, "n w"]:
    marks = torch.zeros(len(places), width, dtype=torch.bool)
    for row, marked in zip(marks, places):
        row[marked] = True
    return marks


def _stored(rows: list[Row], data: DataConfig) -> dict[str, Any]:
    """Stored embeddings by name: [n f], of positives and negatives [n w f] with zeros where there is no text."""
    return {name: _table(name, [row.stored[name] for row in rows], data) for name in rows[0].stored}


def _table(name: str, tables: list[Tensor], data: DataConfig) -> Float[Tensor, "n *w f"]:
    widths = sorted({table.shape[-1] for table in tables})
    if len(widths) > 1:
        raise UserError(f"{name}: pairs of one batch hold rows of {' and '.join(map(str, widths))}; embed them alike")
    if tables[0].ndim == 1:
        return torch.stack(tables)
    places = data.positives if "positive" in name else data.negatives
    out = torch.zeros(len(tables), places, widths[0])
    for row, table in zip(out, tables):
        row[: len(table)] = table
    return out


def _negative_pictures(
    rows: list[Row], width: int
) -> tuple[UInt8[Tensor, "n w 3 s s"] | None, Bool[Tensor, "n w"] | None]:
    """Pictures of the first `width` negatives, black where there is none, and which there are."""
    if not width:
        return None, None
    pictures = torch.zeros(len(rows), width, *rows[0].picture.shape, dtype=torch.uint8)
    exist = torch.zeros(len(rows), width, dtype=torch.bool)
    for n, row in enumerate(rows):
        for place, picture in enumerate(row.negative_pictures):
            if picture is not None:
                pictures[n, place], exist[n, place] = picture, True
    return pictures, exist
