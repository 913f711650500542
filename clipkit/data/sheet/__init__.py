"""Contact sheets: pairs with picture, captions and negatives, on one HTML page or in one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.config import Config
from clipkit.data.decode import Preprocess
from clipkit.data.reader import Online
from clipkit.data.shards import write_atomic
from clipkit.data.sheet.drawing import draw
from clipkit.data.sheet.page import page
from clipkit.data.sheet.pairs import Sheet, drawn_pairs, stored_pairs
from clipkit.errors import UserError

__all__ = ["Sheet", "drawn_sheet", "show_shard", "stored_sheet", "write_html", "write_png"]

MOST_DRAWN = 200
"""Pairs in a PNG; viewers do not like longer ones."""


def show_shard(
    patterns: str | Path | Sequence[str | Path], n: int = 3, start: int = 0, random: int | None = None
) -> list[dict[str, Any]]:
    """`n` pairs from `start` on → [{"id", "where", "members": {suffix: bytes}, "picture", "captions", ...}].

    "picture" is "WxH", "negatives" one list of {"text", "kind"} per caption; JSON-able. A pair that cannot be used has
    "problem" in their place. With the seed `random` the pairs are drawn from all that follow `start`.
    """
    return [pair.to_json() for pair in stored_pairs(patterns, n, start, random)[0]]


def stored_sheet(
    patterns: str | Path | Sequence[str | Path], n: int, start: int = 0, random: int | None = None
) -> Sheet:
    """Pairs as they are stored."""
    pairs, total = stored_pairs(patterns, n, start, random)
    names = ", ".join(map(str, [patterns] if isinstance(patterns, (str, Path)) else patterns))
    return Sheet(names, f"{len(pairs)} of {total:,} pairs, as stored{_chosen(random)}", pairs)


def drawn_sheet(
    config: Config,
    preprocess: Preprocess,
    step: int = 0,
    n: int = 24,
    start: int = 0,
    random: int | None = None,
    online: Online | None = None,
) -> Sheet:
    """Pairs of a batch of the run that `config` describes; see `drawn_pairs`."""
    pairs = drawn_pairs(config, preprocess, step, n, start, random, online)
    about = f"{len(pairs)} of the {config.batch_size:,} pairs of step {step}, as the towers get them{_chosen(random)}"
    return Sheet(f"{config.name}: {', '.join(config.data.train)}", about, pairs)


def _chosen(random: int | None) -> str:
    return "" if random is None else f", chosen by seed {random}"


def write_html(sheet: Sheet, path: Path) -> None:
    """One file with everything in it."""
    write_atomic(path, page(sheet).encode())


def write_png(sheet: Sheet, path: Path) -> None:
    """One picture. Raises UserError for more pairs than it can hold."""
    if len(sheet.pairs) > MOST_DRAWN:
        raise UserError(f"{path}: a PNG holds at most {MOST_DRAWN} pairs, not {len(sheet.pairs)}; write an HTML page")
    buffer = io.BytesIO()
    draw(sheet).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
