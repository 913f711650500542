"""The two loaders that `perf/loader.py` compares, what they read, and how their time is taken."""

from __future__ import annotations

import io
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.nn import functional

from clipkit.data.augment import TRIES, crop_box
from clipkit.data.build import Sample, write_shard
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.seeds import uniform
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.settings import DataConfig

SIZE, BATCH, ROUNDS, QUALITY = 224, 64, 7, 90
TOKENIZER = Tokenizer()
WORDS = "a the two young brown dog man woman runs jumps through over green grass red ball while wearing shirt"
Run = Callable[[], Iterator[Any]]


def shard(pictures: Path, out: Path, count: int, negatives: int = 0, width: int = 512, height: int = 384) -> Path:
    """A shard of `count` pictures of one size with a Flickr-like caption and so many negatives each."""
    words, draw = WORDS.split(), np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(draw.choice(words, 11)) + " ."

    def samples() -> Iterator[Sample]:
        with tarfile.open(pictures) as tar:
            names = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
            for i in range(count):
                file: Any = tar.extractfile(names[i % len(names)])
                buffer = io.BytesIO()
                picture = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
                picture.save(buffer, "JPEG", quality=QUALITY)
                extra = {"negatives": [[{"text": sentence(), "kind": "x"} for _ in range(negatives)]]}
                yield Sample(f"{i:06d}", buffer.getvalue(), "jpg", [sentence()], extra)

    path = out / f"{width}x{height}-{negatives}.tar"
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


def ours(shards: Path, workers: int = 0, **settings: Any) -> Iterator[Any]:
    """clipkit's loader."""
    index = Index.load(shards)
    plan, data = Plan(index, batch_size=BATCH), DataConfig(workers=workers, **settings)
    loader = Loader(index, plan, data=data, preprocess=Preprocess(SIZE), tokenizer=TOKENIZER, seed=0)
    return loader.steps(0, plan.batches)


def floor(shard: Path) -> Run:
    """Nothing but libjpeg-turbo's decoding and torch's resize: bytes in memory, crops as the loader draws them."""
    index, scale = Index.load(shard), DataConfig().crop_scale
    rows = []
    for id in range(len(index)):
        data = index.read(id)["jpg"]
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        rows.append((data, *crop_box(height, width, scale, uniform(4 * TRIES, 0, "crop", 0, id))))

    def run() -> Iterator[Any]:
        for data, top, left, height, width in rows:
            cut = torch.from_numpy(simplejpeg.decode_jpeg(data)[top : top + height, left : left + width])
            picture = cut.permute(2, 0, 1)[None]
            yield functional.interpolate(picture, (SIZE, SIZE), mode="bicubic", antialias=True)

    return run


def cpu_ms(run: Run, samples: int) -> float:
    """CPU milliseconds a sample of one pass."""
    began = time.process_time()
    for _ in run():
        pass
    return (time.process_time() - began) / samples * 1e3


def medians(runs: dict[str, Run], samples: int) -> dict[str, float]:
    """CPU milliseconds a sample: after a pass to warm up, rounds take turns and the median counts."""
    for run in runs.values():
        cpu_ms(run, samples)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(cpu_ms(run, samples))
    return {name: statistics.median(values) for name, values in times.items()}
