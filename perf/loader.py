"""CPU time a sample from tar to batch: clipkit's loader against open_clip's pipeline on the same shards, in one run.

python perf/loader.py PICTURES.tar [SAMPLES]      prints, and writes perf/results/loader.json

The pictures of the given shard are brought to 512 x 384 and about 45 kB; training transform to 224 pixels. open_clip's
pipeline is its own transform and tokenizer behind the webdataset stages of open_clip_train/data.py. Both run in this
process on one thread; rounds take turns and the median counts. clipkit leaves uint8, open_clip normalised float32.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset
from PIL import Image
from startup import processor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from clipkit.config import DataConfig
from clipkit.data.build import Sample, write_shard
from clipkit.data.decode import Preprocess, read_pixels, resize
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer

RESULT = Path(__file__).parent / "results" / "loader.json"
SIZE, BATCH, ROUNDS, QUALITY = 224, 64, 7, 90
TOKENIZER = Tokenizer()
WORDS = "a the two young brown dog man woman runs jumps through over green grass red ball while wearing shirt"


def shard(pictures: Path, out: Path, count: int, negatives: int) -> Path:
    """A shard of `count` pictures of 512 x 384 with a Flickr-like caption and so many negatives each."""
    words, draw = WORDS.split(), np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(draw.choice(words, 11)) + " ."

    def samples() -> Iterator[Sample]:
        with tarfile.open(pictures) as tar:
            names = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
            for i in range(count):
                file: Any = tar.extractfile(names[i % len(names)])
                buffer = io.BytesIO()
                picture = Image.open(file).convert("RGB").resize((512, 384), Image.Resampling.BICUBIC)
                picture.save(buffer, "JPEG", quality=QUALITY)
                extra = {"negatives": [[{"text": sentence(), "kind": "x"} for _ in range(negatives)]]}
                yield Sample(f"{i:06d}", buffer.getvalue(), "jpg", [sentence()], extra)

    path = out / f"{negatives}.tar"
    write_shard(samples(), path)
    return path


def peer(shard: Path) -> Iterator[Any]:
    """open_clip 3.3's training pipeline: picture, caption, batch."""
    transform = open_clip.image_transform(SIZE, is_train=True)
    tokenizer = open_clip.SimpleTokenizer()
    return iter(
        webdataset.DataPipeline(
            webdataset.SimpleShardList([str(shard)]),
            webdataset.tarfile_to_samples(),
            webdataset.decode("pilrgb"),
            webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
            webdataset.map_dict(image=transform, text=lambda text: tokenizer(text, context_length=77)[0]),
            webdataset.to_tuple("image", "text"),
            webdataset.batched(BATCH, partial=False),
        )
    )


def ours(shard: Path, negatives: int = 0) -> Iterator[Any]:
    """clipkit's loader."""
    index = Index.load(shard)
    plan, data = Plan(index, batch_size=BATCH), DataConfig(workers=0, negatives=negatives)
    loader = Loader(index, plan, data=data, preprocess=Preprocess(SIZE), tokenizer=TOKENIZER, seed=0)
    return loader.steps(0, plan.batches)


def cpu_ms(run: Callable[[], Iterator[Any]], samples: int) -> float:
    """CPU milliseconds a sample of one pass."""
    began = time.process_time()
    for _ in run():
        pass
    return (time.process_time() - began) / samples * 1e3


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


def distance(rows: list[tuple[Any, ...]]) -> tuple[int, float]:
    """(largest, mean) difference in levels between clipkit's pixels and Pillow's bicubic, over whole pictures."""
    largest, total = 0, []
    for data, picture, *_ in rows:
        found = resize(read_pixels(data), SIZE, SIZE, "bicubic").permute(1, 2, 0).numpy().astype(int)
        off = np.abs(found - np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int))
        largest, total = max(largest, int(off.max())), [*total, off.mean()]
    return largest, float(np.mean(total))


def main(pictures: str, samples: int = 512) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        one, five = (shard(Path(pictures), Path(folder), samples, k) for k in (0, 4))
        runs = {
            "open_clip, 1 caption": lambda: peer(one),
            "clipkit, 1 caption": lambda: ours(one),
            "clipkit, caption and 4 negatives": lambda: ours(five, 4),
        }
        for run in runs.values():
            cpu_ms(run, samples)
        times = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(cpu_ms(run, samples))
        rows = rows_of(five, min(200, samples))
        parts = {}
        for name, pair in stages().items():
            best = [min(cpu_ms(lambda call=call: map(call, rows), len(rows)) for _ in range(ROUNDS)) for call in pair]
            parts[name] = {"open_clip_ms": round(best[0], 4), "clipkit_ms": round(best[1], 4)}
            parts[name]["ratio"] = round(best[0] / best[1], 2)
        largest, mean = distance(rows)
        size = sum(len(row[0]) for row in rows) / len(rows)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["open_clip, 1 caption"]
    pipeline = {name: {"cpu_ms": round(m, 3), "ratio": round(base / m, 2)} for name, m in medians.items()}
    for name, row in (pipeline | parts).items():
        print(f"{name:36}" + "".join(f"{column} {value}   " for column, value in row.items()))
    print(f"pixels against Pillow: {largest} level at most, {mean:.4f} on average; {size / 1e3:.0f} kB a picture")
    result = {
        "date": str(date.today()),
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "webdataset": webdataset.__version__,
        },
        "picture": f"512 x 384, {size / 1e3:.0f} kB",
        "rounds": ROUNDS,
        "whole pipeline, CPU a sample": pipeline,
        "stages": parts,
        "levels off Pillow's bicubic": {"largest": largest, "mean": round(mean, 5)},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
