"""Small real shards: coloured noise pictures with captions and typed negatives, written by the code under test."""

from __future__ import annotations

import io
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.data.build import Sample, encode_jpeg, write_shard
from clipkit.data.shards import Index

PATIENCE_S = 60


@pytest.fixture
def watchdog() -> Iterator[None]:
    """Ends a test that hangs, by name, instead of the whole run."""

    def bark(*_: object) -> None:
        raise TimeoutError(f"still not done after {PATIENCE_S} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def noise_picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth random picture."""
    grid = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def sample(number: int, **extra: object) -> Sample:
    """Two captions; the first has three negatives of two kinds, the second one."""
    captions = [f"picture {number} first words", f"the other words of picture number {number}"]
    negatives = [
        [{"text": f"{number} {kind} {i}", "kind": kind} for kind, n in (("swap", 2), ("replace", 1)) for i in range(n)],
        [{"text": f"{number} lone", "kind": "swap"}],
    ]
    image = encode_jpeg(noise_picture(number))
    return Sample(f"k{number:05d}", image, "jpg", captions, {"negatives": negatives, **extra})


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three uneven shards of 7, 1 and 15 pairs."""
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for number, count in enumerate((7, 1, 15)):
        write_shard((sample(i) for i in range(first, first + count)), folder / f"s-{number}.tar")
        first += count
    return folder


@pytest.fixture(scope="session")
def index(shard_folder: Path) -> Index:
    """The 23 pairs of `shard_folder`."""
    return Index.load(shard_folder)


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Write any members, in order, to a tar."""

    def write(members: list[tuple[str, bytes]], name: str = "x.tar") -> Path:
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, data in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return tmp_path / name

    return write
