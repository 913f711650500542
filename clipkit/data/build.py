"""Samples into tar shards: what `clipkit shards build` writes and every reader of clipkit (or webdataset) understands.

Members of a pair: KEY.jpg or KEY.png, KEY.txt (the first caption) and KEY.json with `captions` (all of them) and,
where there are any, the other fields of members.py, and whatever else the source knows; KEY.negative0.jpg, ..., the
pictures of negatives.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from clipkit.errors import UserError
from clipkit.registry import SOURCES

Item = TypeVar("Item")


@dataclass
class Sample:
    """One picture with its captions, as a source yields it and a shard stores it.

    `image` are the encoded bytes, `suffix` their format (one of members.PICTURES), `extra` everything else that
    KEY.json shall hold ("negatives", "group", "scene", ...; JSON-able), `negative_images` encoded pictures by suffix
    ("negative0.jpg").
    """

    key: str
    image: bytes
    suffix: str
    captions: list[str]
    extra: dict[str, Any] = field(default_factory=dict)
    negative_images: dict[str, bytes] = field(default_factory=dict)


def build_shards(
    input: str | Path,
    out: str | Path,
    source: str | None = None,
    per_shard: int = 1000,
    name: str = "shard",
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> list[Path]:
    """Read INPUT with a source (guessed from its shape when not named) and write shards to the folder `out`.

    Returns the shards written. Raises UserError when the input does not fit the source or holds no pair.
    """
    from clipkit.data.sources import guess

    path = Path(input)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    chosen = source or guess(path)
    SOURCES.entry(chosen)
    samples = SOURCES[chosen](path, **settings)
    shards = write_shards(samples, out, per_shard=per_shard, name=name, overwrite=overwrite, progress=progress)
    if not shards:
        raise UserError(f"{path}: read as {chosen}, it holds no pair of a picture and a caption; name another format")
    return shards


def write_shards(
    samples: Iterable[Sample],
    out: str | Path,
    *,
    per_shard: int = 1000,
    name: str = "shard",
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write `samples` to OUT/NAME-000000.tar, ... with `per_shard` pairs each; the same samples give the same bytes.

    Each shard appears under its name only when it is complete. Raises UserError when shards of that name lie there
    already, unless `overwrite` removes them, and when a key comes twice in a shard.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(folder.glob(f"{name}-[0-9]*.tar"))
    if old and not overwrite:
        raise UserError(
            f"{folder}: already holds {len(old)} shards called {name}-*; choose another folder or overwrite"
        )
    stream = iter(tracked(samples, f"writing {name} shards") if progress else samples)
    shards: list[Path] = []
    while chunk := list(islice(stream, per_shard)):
        shards.append(folder / f"{name}-{len(shards):06d}.tar")
        write_shard(chunk, shards[-1])
    for path in set(old) - set(shards):
        path.unlink()
    return shards


def write_shard(samples: Iterable[Sample], path: Path) -> None:
    """Write one tar under a temporary name, then put it in place. Raises UserError when a key comes twice."""
    write_members(map(_members, samples), path)


def write_members(pairs: Iterable[dict[str, Any]], path: Path) -> None:
    """`write_shard` of pairs given by their members: {"__key__": KEY, "jpg": bytes, ...}."""
    import webdataset

    seen: set[str] = set()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # The format takes names of any length; fixed times make the bytes a function of the samples.
            with webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:  # type: ignore[arg-type]
                for members in pairs:
                    if members["__key__"] in seen:
                        raise UserError(f"{path}: two samples have the key {members['__key__']}; keys name a pair")
                    seen.add(members["__key__"])
                    tar.write(members)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _members(sample: Sample) -> dict[str, Any]:
    sheet = sample.extra | {"captions": sample.captions}
    return {
        "__key__": safe_key(sample.key),
        sample.suffix: sample.image,
        **sample.negative_images,
        "txt": sample.captions[0].encode(),
        "json": json.dumps(sheet, ensure_ascii=False, sort_keys=True).encode(),
    }


def safe_key(key: str) -> str:
    """`key` without what tar readers stumble on: dots (webdataset cuts there), leading slashes, spaces, `..`."""
    return re.sub(r"[^\w/-]+", "_", key).strip("/")


def tracked(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """`items` behind a progress bar on a terminal; in a log nothing is drawn."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, total, console=console, disable=not console.is_terminal, transient=True)


def encode_jpeg(picture: Any, quality: int = 92) -> bytes:
    """A PIL picture as JPEG bytes without chroma subsampling, which would smear small coloured shapes."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
