"""CPU time a sample from tar to batch: clipkit's loader against open_clip's pipeline on the same shards, in one run.

python perf/loader.py PICTURES.tar [SAMPLES]      prints, and writes perf/results/loader.json

The pictures of the given shard are brought to 512 x 384 and about 45 kB (and, for the table of sizes, to others);
training transform to 224 pixels. open_clip's pipeline is its own transform and tokenizer behind the webdataset stages
of open_clip_train/data.py. Both run in this process on one thread; rounds take turns and the median counts. clipkit
leaves uint8, open_clip normalised float32. The floor is libjpeg-turbo's decoding and torch's resize alone.
"""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset
from memory import caches, epoch
from PIL import Image, __version__
from pipelines import ROUNDS, SIZE, TOKENIZER, cpu_ms, floor, medians, ours, peer, shard
from startup import processor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from clipkit.data.augment import random_view
from clipkit.data.decode import Preprocess, View, decode_view, read_pixels
from clipkit.data.reshard import reshard
from clipkit.data.resize import resize
from clipkit.data.shards import Index

RESULT = Path(__file__).parent / "results" / "loader.json"
SIZES = [(341, 256), (640, 480), (1024, 768)]
Table = dict[str, dict[str, Any]]


def stages() -> dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]:
    """Stage → (open_clip's, clipkit's) on the same input."""
    crop = {"top": 10, "left": 12, "height": 360, "width": 480}
    theirs = open_clip.SimpleTokenizer()

    def resized(data: Any) -> Any:
        return tv.resized_crop(data[0], **crop, size=[SIZE, SIZE], interpolation=InterpolationMode.BICUBIC)

    def ours_resized(data: Any) -> Any:
        return resize(data[1][:, 10:370, 12:492], SIZE, SIZE, "bicubic")

    return {
        "decode": (
            lambda row: np.asarray(Image.open(io.BytesIO(row[0])).convert("RGB")),
            lambda row: read_pixels(row[0]),
        ),
        "crop and resize": (lambda row: resized(row[1:3]), lambda row: ours_resized(row[1:3])),
        "tokenise a caption": (lambda row: theirs([row[3]]), lambda row: TOKENIZER([row[3]])),
        "tokenise five captions": (lambda row: theirs(row[4]), lambda row: TOKENIZER(row[4])),
    }


def by_stage(rows: list[tuple[Any, ...]]) -> Table:
    """CPU milliseconds of each stage, the best of the rounds."""
    parts: Table = {}
    for name, pair in stages().items():
        best = [min(cpu_ms(lambda call=call: map(call, rows), len(rows)) for _ in range(ROUNDS)) for call in pair]
        parts[name] = {"open_clip_ms": round(best[0], 4), "clipkit_ms": round(best[1], 4)}
        parts[name]["ratio"] = round(best[0] / best[1], 2)
    return parts


def rows_of(shard: Path, count: int) -> list[tuple[Any, ...]]:
    """(bytes, PIL picture, pixels, caption, five captions) of the first pairs."""
    index = Index.load(shard)
    rows = []
    for id in range(count):
        members = index.read(id)
        sheet = json.loads(members["json"])
        texts = [*sheet["captions"], *(n["text"] for n in sheet["negatives"][0])]
        picture = Image.open(io.BytesIO(members["jpg"])).convert("RGB")
        rows.append((members["jpg"], picture, read_pixels(members["jpg"]), texts[0], texts))
    return rows


def exact_distance(rows: list[tuple[Any, ...]]) -> dict[str, float]:
    """clipkit's pixels against Pillow's bicubic, over whole pictures."""
    found = [resize(read_pixels(data), SIZE, SIZE, "bicubic") for data, *_ in rows]
    return levels(found, [picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for _, picture, *_ in rows])


def scaled_distance(shard: Path, count: int) -> dict[str, float]:
    """Scaled decoding against Pillow's bicubic of the same box, whose edges are where the small picture has its own."""
    index = Index.load(shard)
    found, expected = [], []
    for id in range(count):
        data = index.read(id)["jpg"]
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        view = random_view(picture.height, picture.width, SIZE, 0.9, "crop", id)
        factor, box = view.reduction(), view.reduced(view.reduction())
        sides = (box.left, box.top, box.left + box.width, box.top + box.height)

        def view_of(_height: int, _width: int, view: View = view) -> View:
            return view

        found.append(decode_view(data, view_of, Preprocess(SIZE), scaled=True))
        cut = picture.crop(tuple(factor * side for side in sides))
        expected.append(cut.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return levels(found, expected)


def levels(found: list[torch.Tensor], expected: list[Image.Image]) -> dict[str, float]:
    """Largest and mean difference."""
    off = [np.abs(a.permute(1, 2, 0).numpy().astype(int) - np.asarray(b)) for a, b in zip(found, expected)]
    return {"largest": max(int(one.max()) for one in off), "mean": round(float(np.mean(off)), 5)}


def rated(times: dict[str, float], base: str) -> Table:
    """Milliseconds and how many times as fast as `base`."""
    return {name: {"cpu_ms": round(ms, 3), "ratio": round(times[base] / ms, 2)} for name, ms in times.items()}


def whole_pipeline(pictures: Path, folder: Path, samples: int) -> tuple[Path, Path, Table]:
    """The shards with and without negatives, and the pipelines over them, also over the same pictures made smaller."""
    one, five = (shard(pictures, folder, samples, k) for k in (0, 4))
    reshard(one, folder / "small", short_side=256, progress=False)
    runs = {
        "open_clip, 1 caption": lambda: peer(one),
        "clipkit, 1 caption": lambda: ours(one),
        "clipkit, caption and 4 negatives": lambda: ours(five, negatives=4),
        "clipkit, resharded to a short side of 256": lambda: ours(folder / "small"),
        "floor: bare decode and resize": floor(one),
    }
    return one, five, rated(medians(runs, samples), "open_clip, 1 caption")


def by_size(pictures: Path, folder: Path, samples: int) -> Table:
    """open_clip, clipkit and clipkit with scaled decoding on pictures of other sizes."""
    table: Table = {}
    for width, height in SIZES:
        one = shard(pictures, folder, samples, 0, width, height)
        runs = {
            "open_clip": lambda one=one: peer(one),
            "exact": lambda one=one: ours(one),
            "scaled": lambda one=one: ours(one, decode="scaled"),
        }
        row = rated(medians(runs, samples), "open_clip")
        row["scaled, levels off Pillow's bicubic"] = scaled_distance(one, min(200, samples))
        table[f"{width} x {height}"] = row
        one.unlink()
    return table


def main(pictures: str, samples: int = 512) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, five, pipeline = whole_pipeline(Path(pictures), folder, samples)
        rows = rows_of(five, min(200, samples))
        sizes = by_size(Path(pictures), folder, samples // 2)
        memory = {"MiB over an epoch": epoch(one, folder / "many"), "word cache": caches()}
    above = pipeline["clipkit, 1 caption"]["cpu_ms"] / pipeline["floor: bare decode and resize"]["cpu_ms"]
    result = {
        "date": str(date.today()),
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "webdataset": webdataset.__version__,
            "pillow": __version__,
        },
        "picture": f"512 x 384, {sum(len(row[0]) for row in rows) / len(rows) / 1e3:.0f} kB",
        "rounds": ROUNDS,
        "whole pipeline, CPU a sample": pipeline,
        "whole pipeline over its floor": round(above, 3),
        "sizes": sizes,
        "stages": by_stage(rows),
        "levels off Pillow's bicubic": exact_distance(rows),
        "memory": memory,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
