"""A hundred kinds of broken shard: each is refused or counted by name, none hangs, and the good pairs all arrive."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipkit.data.build import encode_jpeg
from clipkit.data.check import check_shards
from clipkit.data.decode import Preprocess
from clipkit.data.loader import Loader
from clipkit.data.plan import Plan
from clipkit.data.shards import Index
from clipkit.data.tokenize import Tokenizer
from clipkit.errors import UserError
from clipkit.settings import DataConfig

from .conftest import noise_picture

GOOD = 6
pytestmark = pytest.mark.usefixtures("watchdog")
Member = tuple[str, bytes]


def encoded(picture: Image.Image, form: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)
    return buffer.getvalue()


JPEG = encode_jpeg(noise_picture(0, 64, 48))
PNG = encoded(noise_picture(0, 64, 48), "PNG")
BOMB = encoded(Image.new("1", (12000, 12000)), "PNG")

PICTURES: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\xff",
    "start of a JPEG": JPEG[:2],
    "JPEG cut in its header": JPEG[:150],
    "JPEG without a header": JPEG[300:],
    "JPEG without its start": b"\0\0" + JPEG[2:],
    "PNG cut in its signature": PNG[:6],
    "PNG cut in its header": PNG[:20],
    "PNG cut in its data": PNG[: len(PNG) // 2],
    "PNG with a wrong checksum": PNG[:40] + bytes([PNG[40] ^ 255]) + PNG[41:],
    "WEBP cut": encoded(noise_picture(0), "WEBP")[:60],
    "GIF cut": encoded(noise_picture(0), "GIF")[:20],
    "BMP cut": encoded(noise_picture(0), "BMP")[:60],
    "TIFF": encoded(noise_picture(0), "TIFF"),
    "ICO": encoded(noise_picture(0), "ICO"),
    "PDF": encoded(noise_picture(0), "PDF"),
    "EPS": encoded(noise_picture(0), "EPS"),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "error page": b"<!DOCTYPE html><html><title>404 Not Found</title></html>",
    "JSON error": b'{"error": "rate limit"}',
    "words": b"no picture at all",
    "zeros": bytes(5000),
    "noise": random.Random(0).randbytes(5000),
    "gzipped JPEG": gzip.compress(JPEG),
    "decompression bomb": BOMB,
    "thread": encoded(Image.new("RGB", (2000, 2)), "PNG"),
    "wire": encoded(Image.new("RGB", (2, 2000)), "PNG"),
    "two pictures' halves": JPEG[: len(JPEG) // 2] + PNG[len(PNG) // 2 :],
    "tar in a tar": b"x.jpg" + bytes(95) + b"0000644\0" + bytes(404) + JPEG,
} | {f"JPEG cut at {share} %": JPEG[: len(JPEG) * share // 100] for share in range(10, 100, 10)}

SHEETS: dict[str, Member] = {
    "empty text": ("txt", b""),
    "blank text": ("txt", b" \t\n "),
    "UTF-16 text": ("txt", "a dog".encode("utf-16")),
    "Latin-1 text": ("txt", "ein Bär".encode("latin-1")),
    "picture for a text": ("txt", JPEG),
    "empty JSON": ("json", b""),
    "cut JSON": ("json", b'{"captions": ["a dog'),
    "JSON list": ("json", b'["a dog"]'),
    "JSON text": ("json", b'"a dog"'),
    "JSON null": ("json", b"null"),
    "JSON in UTF-16": ("json", '{"captions": ["a dog"]}'.encode("utf-16")),
    "two JSON values": ("json", b'{"captions": ["a"]} {"captions": ["b"]}'),
    "captions a text": ("json", b'{"captions": "a dog"}'),
    "captions numbers": ("json", b'{"captions": [1, 2]}'),
    "captions a mapping": ("json", b'{"captions": {"en": "a dog"}}'),
    "captions with null": ("json", b'{"captions": ["a", null]}'),
    "no captions": ("json", b'{"captions": []}'),
    "blank captions": ("json", b'{"captions": ["", " "]}'),
    "caption null": ("json", b'{"caption": null, "captions": null}'),
    "caption a number": ("json", b'{"caption": 7}'),
    "no caption at all": ("json", b'{"url": "http://x"}'),
    "negatives a text": ("json", b'{"captions": ["a"], "negatives": "b"}'),
    "negatives flat": ("json", b'{"captions": ["a"], "negatives": ["b"]}'),
    "negatives without text": ("json", b'{"captions": ["a"], "negatives": [[{"kind": "swap"}]]}'),
    "negatives with a number": ("json", b'{"captions": ["a"], "negatives": [[{"text": 3}]]}'),
    "deep JSON": ("json", b"[" * 100_000 + b"]" * 100_000),
}

BAD = "bad"
MEMBERS: dict[str, list[Member]] = {
    "picture alone": [(f"{BAD}.jpg", JPEG)],
    "text alone": [(f"{BAD}.txt", b"words")],
    "sheet alone": [(f"{BAD}.json", b'{"captions": ["a"]}')],
    "pair twice": [(f"{BAD}.jpg", JPEG), (f"{BAD}.txt", b"a"), (f"{BAD}.jpg", JPEG), (f"{BAD}.txt", b"b")],
    "picture twice": [(f"{BAD}.jpg", JPEG), (f"{BAD}.txt", b"a"), (f"{BAD}.JPG", JPEG)],
    "picture and text under two keys": [(f"{BAD}.jpg", JPEG), (f"{BAD}2.txt", b"a")],
    "key of dots": [("...jpg", JPEG)],
    "picture of another suffix": [(f"{BAD}.tiff", JPEG), (f"{BAD}.txt", b"a")],
    "other case, other key": [("BAD.jpg", JPEG), ("bad.txt", b"a")],
}


def good() -> list[Member]:
    return [
        member
        for i in range(GOOD)
        for member in ((f"{i}.jpg", encode_jpeg(noise_picture(i + 1))), (f"{i}.txt", f"good {i}".encode()))
    ]


def tar_of(members: list[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def arranged(bad: list[Member]) -> list[Member]:
    """The bad members in the middle of the good ones."""
    return good()[:GOOD] + bad + good()[GOOD:]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def arrivals(path: Path, tokenizer: Tokenizer) -> tuple[set[str], dict[str, str]]:
    """(keys that training is given, {key: reason} of all others); skipping, over one epoch."""
    index = Index.load(path, on_error="skip")
    plan, data = Plan(index, batch_size=len(index), lanes=1), DataConfig(workers=0, augment="none", on_error="skip")
    loader = Loader(index, plan, data=data, preprocess=Preprocess(16), tokenizer=tokenizer, seed=0)
    (batch,) = loader.steps(0, 1)
    left_out = dict(index.problems) | dict(batch.skipped)
    return {index.key(id) for id in batch.id.tolist()}, {
        where.partition("/")[2]: reason for where, reason in left_out.items()
    }


def assert_counted(path: Path, tokenizer: Tokenizer) -> None:
    keys, left_out = arrivals(path, tokenizer)
    assert keys == {str(i) for i in range(GOOD)}
    assert left_out and all(reason.strip() for reason in left_out.values())
    with pytest.raises(UserError) as caught:  # the default does not skip
        index = Index.load(path)
        data = DataConfig(workers=0, augment="none")
        list(Loader(index, Plan(index, batch_size=len(index), lanes=1), data=data, preprocess=Preprocess(16),
                    tokenizer=tokenizer, seed=0).steps(0, 1))  # fmt: skip
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    found = check_shards(path, progress=False)
    assert sum(found["reasons"].values()) >= 1 and found["usable"] == GOOD


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, write_tar: Callable[..., Path], tokenizer: Tokenizer) -> None:
    assert_counted(write_tar(arranged([(f"{BAD}.jpg", PICTURES[name]), (f"{BAD}.txt", b"words")])), tokenizer)


@pytest.mark.parametrize("name", SHEETS)
def test_sheets(name: str, write_tar: Callable[..., Path], tokenizer: Tokenizer) -> None:
    suffix, data = SHEETS[name]
    assert_counted(write_tar(arranged([(f"{BAD}.jpg", JPEG), (f"{BAD}.{suffix}", data)])), tokenizer)


@pytest.mark.parametrize("name", MEMBERS)
def test_members(name: str, write_tar: Callable[..., Path], tokenizer: Tokenizer) -> None:
    path = write_tar(arranged(MEMBERS[name]))
    keys, left_out = arrivals(path, tokenizer)
    assert keys >= {str(i) for i in range(GOOD)}
    assert keys - {str(i) for i in range(GOOD)} <= {BAD} and left_out


ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda tar: b"",
    "zeros": lambda tar: bytes(len(tar)),
    "gzipped": gzip.compress,
    "cut in the first header": lambda tar: tar[:300],
    "a page of HTML": lambda tar: b"<html>" * 2000,
    "bytes in front": lambda tar: b"garbage" + tar,
    "without its end": lambda tar: tar[: len(tar) // 10240 * 10240 - 10240],
} | {f"cut at {share} %": (lambda tar, share=share: tar[: len(tar) * share // 100]) for share in range(5, 100, 10)}


def flipped(tar: bytes, seed: int) -> bytes:
    """Twenty bytes in a row overwritten somewhere."""
    rng = random.Random(seed)
    start = rng.randrange(len(tar) - 20)
    return tar[:start] + rng.randbytes(20) + tar[start + 20 :]


ARCHIVES |= {f"twenty wrong bytes, {seed}": (lambda tar, seed=seed: flipped(tar, seed)) for seed in range(20)}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Refused in one line, or all that lies whole in front of the damage arrives."""
    whole = tar_of(good())
    broken = ARCHIVES[name](whole)
    (path := tmp_path / "x.tar").write_bytes(broken)
    same = next((i for i, (a, b) in enumerate(zip(whole, broken)) if a != b), min(len(whole), len(broken)))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = {m.name: m.offset_data + m.size for m in tar.getmembers()}
    in_front = {str(i) for i in range(GOOD) if max(ends[f"{i}.jpg"], ends[f"{i}.txt"]) <= same}
    try:
        keys, left_out = arrivals(path, tokenizer)
    except UserError as refused:
        assert "\n" not in str(refused) and "x.tar" in str(refused) and not in_front
    else:
        assert in_front <= keys
        assert left_out or keys == {str(i) for i in range(GOOD)}


def test_there_are_a_hundred() -> None:
    assert sum(map(len, (PICTURES, SHEETS, MEMBERS, ARCHIVES))) >= 100
