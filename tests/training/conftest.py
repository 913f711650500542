"""A tiny run: 48 small pictures with two captions and ragged negatives each, towers that step in milliseconds."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.data.build import Sample, encode_jpeg, write_shards

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 30)}
NOUNS = ("wall", "door", "boat")


def tiny_samples(count: int) -> list[Sample]:
    rng = random.Random(0)
    samples = []
    for number in range(count):
        left, right = rng.sample(list(COLOURS), 2)
        noun, other = rng.sample(NOUNS, 2)
        picture = Image.new("RGB", (40, 32), COLOURS[left])
        picture.paste(COLOURS[right], (20, 0, 40, 32))
        captions = [f"a {left} {noun} and a {right} {other}", f"the {right} {other} is right of the {left} {noun}"]
        negatives = [
            [{"text": f"a {right} {noun} and a {left} {other}", "kind": "swap_adjectives"}][: number % 3],
            [{"text": f"the {left} {other} is right of the {right} {noun}", "kind": "swap_adjectives"}]
            + [{"text": f"the {right} {noun} is right of the {left} {other}", "kind": "swap_nouns"}] * (number % 2),
        ]
        samples.append(Sample(f"{number:04d}", encode_jpeg(picture), "jpg", captions, {"negatives": negatives}))
        samples[-1].extra |= {"tags": [left, right, noun, other][: number % 5], "label": noun}
    return samples


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(tiny_samples(48), folder, per_shard=20, name="tiny", progress=False)
    return str(folder / "tiny-*.tar")


@pytest.fixture(scope="session")
def tiny_tags(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vocabulary that lacks one of the words."""
    file = tmp_path_factory.mktemp("tags") / "tags.txt"
    file.write_text("\n".join([*COLOURS, "wall", "boat"]))
    return str(file)


STORED = ("llm.text", "llm.negatives", "clip.text", "clip.image", "clip.negatives")
KINDS = ["short", "long", "original", "once", "twice"]


@pytest.fixture(scope="session")
def stored_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same pictures with five captions of as many kinds, and two sets of embeddings of 16 dimensions."""
    folder, samples = tmp_path_factory.mktemp("stored"), tiny_samples(48)
    rng = np.random.default_rng(0)
    for sample in samples:
        sample.captions = [*sample.captions, *(f"{caption} again" for caption in sample.captions), "it"]
        sample.extra["caption_kinds"] = KINDS
        rows = {"text": len(sample.captions), "negatives": sum(map(len, sample.extra["negatives"]))}
        for name in STORED:
            count = rows.get(name.partition(".")[2])
            file = io.BytesIO()
            np.save(file, rng.standard_normal((16,) if count is None else (count, 16)).astype(np.float16))
            sample.negative_images[f"{name}.npy"] = file.getvalue()  # members of any kind
    write_shards(samples, folder, per_shard=20, name="stored", progress=False)
    return str(folder / "stored-*.tar")


@pytest.fixture
def tiny_tree(tiny_shards: str, tmp_path: Path) -> dict:
    """The config of a DeGLA run of 20 steps, under this test's own folder."""
    return degla_tree(tiny_shards, tmp_path)


def degla_tree(shards: str, folder: Path) -> dict:
    """A DeGLA run of 20 steps: every term, ragged negatives, EMA teacher."""
    return {
        "name": "tiny",
        "out": str(folder / "runs/{name}"),
        "batch_size": 16,
        "samples": 320,
        "log_every": 1,
        "log_samples": True,
        "data": {"train": [shards], "negatives": 2, "workers": 0, "lanes": 4, "crop_scale": 0.8},
        "model": {
            "embed_dim": 16,
            "image": {
                "cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
                "size": 16,
            },
            "text": {"width": 32, "heads": 2, "layers": 1, "context_length": 24},
        },
        "objective": {"infonce": {}, "igc": {"weight": 0.1}, "tgc": {"weight": 0.1}, "distill": {"weight": 0.005}},
        "teacher": {"kind": "ema"},
        "optim": {"lr": 1e-3, "warmup": 48},
    }
