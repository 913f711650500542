"""Pictures into pixels: within a level of Pillow's own resize, and every broken file one counted reason."""

from __future__ import annotations

import io
import json
import random
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data.augment import RATIO, TRIES, crop_box, random_view
from clipkit.data.build import encode_jpeg
from clipkit.data.decode import (
    Preprocess,
    View,
    decode,
    decode_view,
    fit,
    read_picture,
    read_pixels,
    show,
    to_pixels,
    whole,
)
from clipkit.data.members import Unreadable
from clipkit.data.seeds import uniform
from clipkit.data.shards import Index

from .conftest import noise_picture


def assert_close(found: torch.Tensor, expected: Image.Image) -> None:
    """[3 h w] against Pillow's resize: hardly a value more than one level off."""
    off = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.array(expected).astype(int))
    assert found.dtype == torch.uint8 and off.max() <= 2 and (off > 1).mean() < 1e-3 and off.mean() < 0.02


def encoded(picture: Image.Image, form: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (90, 70), (64, 64), (333, 65)])
def test_evaluation_transform_is_pillows(shape: tuple[int, int]) -> None:
    """The reference: torchvision's Resize and CenterCrop on a Pillow picture, as open_clip evaluates."""
    picture = noise_picture(0, *shape)
    short = min(shape)
    width, height = (int(64 * side / short) for side in shape)
    left, top = round((width - 64) / 2), round((height - 64) / 2)
    expected = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64))
    assert_close(fit(to_pixels(picture), Preprocess(size=64)), expected)


@pytest.mark.parametrize("settings", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_as_pillow_does(mode: str, settings: dict[str, int]) -> None:
    data = encoded(noise_picture(5, 75, 50).convert(mode), "JPEG", **settings)
    assert torch.equal(read_pixels(data), to_pixels(read_picture(data)))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_squash(interpolation: str) -> None:
    picture = noise_picture(1, 100, 50)
    expected = picture.resize((32, 32), Image.Resampling[interpolation.upper()])
    preprocess = Preprocess(32, resize="squash", interpolation=interpolation)  # type: ignore[arg-type]
    assert_close(fit(to_pixels(picture), preprocess), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    data = encoded(noise_picture(2).convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert decode(data, Preprocess(16)).shape == (3, 16, 16)


def test_palette_with_transparency_gives_no_warning() -> None:
    picture = noise_picture(2).quantize(8)
    assert read_picture(encoded(picture, "PNG", transparency=bytes(range(8)))).mode == "RGB"


@pytest.mark.parametrize("form", ["WEBP", "BMP", "GIF"])
def test_other_formats(form: str) -> None:
    assert read_picture(encoded(noise_picture(3), form)).size == (40, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable picture: 0 bytes"),
        (b"these are words, no picture", "unreadable picture: 27 bytes"),
        (encode_jpeg(noise_picture(4, 200, 200))[:3000], "unreadable picture: OSError"),
        (encoded(noise_picture(4), "PNG")[:300], "unreadable picture: "),
        (encoded(noise_picture(4), "TIFF"), "unreadable picture: "),
        (encoded(Image.new("1", (8000, 12000)), "PNG"), "oversized picture: "),
        (encoded(Image.new("1", (20000, 10000)), "PNG"), "oversized picture: "),
        (encoded(Image.new("L", (5000, 2)), "PNG"), "oversized picture: 5000x2"),
    ],
    ids=["empty", "text", "cut jpeg", "cut png", "tiff", "bomb", "bigger bomb", "thread"],
)
def test_unreadable_pictures_say_why(data: bytes, reason: str) -> None:
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)  # type: ignore[arg-type]
            with pytest.raises(Unreadable, match=reason):
                read_picture(data)


def test_bytes_damaged_anywhere_never_end_a_run_in_another_way() -> None:
    rng = random.Random(0)
    for good in (encode_jpeg(noise_picture(5)), encoded(noise_picture(5), "PNG"), encoded(noise_picture(5), "GIF")):
        for _ in range(150):
            data = bytearray(good)
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                read_picture(bytes(data))
            except Unreadable as reason:
                assert str(reason).partition(":")[0] in ("unreadable picture", "oversized picture")


def test_crop_boxes_keep_area_shape_and_place() -> None:
    for number in range(300):
        rng = random.Random(number)
        height, width, scale = rng.randint(20, 400), rng.randint(20, 400), rng.choice([0.1, 0.5, 0.9])
        top, left, h, w = crop_box(height, width, scale, uniform(4 * TRIES, number))
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        fits = RATIO[0] <= width / height <= RATIO[1]
        if fits and h * w < height * width * scale * 0.95:
            assert scale == 0.9, "only a box that hardly ever fits falls back to the centre"


def test_a_crop_belongs_to_its_key() -> None:
    first, again = (random_view(150, 200, 32, 0.5, 0, "crop", 1, 2) for _ in range(2))
    assert first == again != random_view(150, 200, 32, 0.5, 0, "crop", 2, 2) and first.to == (32, 32)


def test_a_crop_is_pillows() -> None:
    picture = noise_picture(7, 200, 150)
    top, left, height, width = crop_box(150, 200, 0.5, uniform(4 * TRIES, "key"))
    expected = picture.crop((left, top, left + width, top + height)).resize((48, 48), Image.Resampling.BICUBIC)
    assert_close(show(to_pixels(picture), random_view(150, 200, 48, 0.5, "key"), Preprocess(48)), expected)


def crop(height: int, width: int, size: int = 224) -> View:
    return random_view(height, width, size, 0.9, "crop", height)


def on_the_grid(data: bytes, view: View, preprocess: Preprocess) -> torch.Tensor:
    """What scaled decoding should come near to: its own box, decoded exactly."""
    factor, pixels = view.reduction(), read_pixels(data)
    top, left, height, width = (edge * factor for edge in view.reduced(factor)[:4])
    return show(pixels, View(top, left, height, width, view.to), preprocess)


def off(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """(mean, largest) distance in levels."""
    levels = (found.int() - expected.int()).abs()
    return levels.float().mean().item(), int(levels.max())


@pytest.mark.parametrize(
    ("box", "to", "factor"),
    [((480, 640), 224, 2), ((447, 640), 224, 1), ((896, 896), 224, 4), ((4000, 3000), 224, 8), ((90, 90), 224, 1)],
)
def test_scaled_decoding_leaves_enough_pixels(box: tuple[int, int], to: int, factor: int) -> None:
    view = View(3, 5, *box, (to, to))
    assert view.reduction() == factor
    small = view.reduced(factor)
    edges = zip((view.top, view.left, view.top + view.height, view.left + view.width),
                (small.top, small.left, small.top + small.height, small.left + small.width))  # fmt: skip
    assert all(abs(edge - factor * near) <= factor / 2 for edge, near in edges)


@pytest.mark.parametrize("settings", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
@pytest.mark.parametrize("shape", [(640, 480), (481, 643), (1021, 771), (2000, 1500)])
def test_scaled_decoding_shows_the_same_box(shape: tuple[int, int], settings: dict[str, int]) -> None:
    """Of a smooth picture hardly a value changes; a box a pixel off would change most of them."""
    data, preprocess = encoded(noise_picture(8, *shape), "JPEG", quality=95, **settings), Preprocess(224)
    for view_of in (crop, partial(whole, preprocess=preprocess)):
        found = decode_view(data, view_of, preprocess, scaled=True)
        mean, largest = off(found, on_the_grid(data, view_of(*shape[::-1]), preprocess))
        assert found.shape == (3, 224, 224) and 0 < mean < 0.7 and largest <= 6
        mean, largest = off(found, decode_view(data, view_of, preprocess))
        assert mean < 1.5 and largest <= 12


@pytest.mark.parametrize(("size", "most"), [((640, 480), 1.2), ((1024, 768), 0.5)])
def test_scaled_decoding_of_photographs(shared: Path, size: tuple[int, int], most: float) -> None:
    """The stated distance: mean levels off Pillow's decoding and bicubic resize of the same box."""
    index, preprocess = Index.load(shared / "data" / "flickr8k_dev-000.tar"), Preprocess(224)
    found = []
    for id in range(24):
        picture = read_picture(index.read(id)["jpg"]).resize(size, Image.Resampling.BICUBIC)
        data = encode_jpeg(picture)
        pixels, view = decode_view(data, crop, preprocess, scaled=True), crop(*size[::-1])
        box = view.reduced(2)
        corners = (2 * box.left, 2 * box.top, 2 * (box.left + box.width), 2 * (box.top + box.height))
        exact = read_picture(data).crop(corners).resize((224, 224), Image.Resampling.BICUBIC)
        found.append(off(pixels, to_pixels(exact)))
    assert 0.1 < np.mean([mean for mean, _ in found]) < most and max(largest for _, largest in found) <= 40


@pytest.mark.parametrize(
    "data",
    [
        encoded(noise_picture(9, 440, 440), "JPEG"),
        encoded(noise_picture(9, 640, 480), "PNG"),
        encoded(noise_picture(9, 640, 480).convert("CMYK"), "JPEG"),
    ],
    ids=["small", "png", "cmyk"],
)
def test_what_cannot_be_scaled_is_decoded_exactly(data: bytes) -> None:
    exact, scaled = (decode_view(data, crop, Preprocess(224), scaled=scaled) for scaled in (False, True))
    assert torch.equal(exact, scaled)


def test_damaged_pictures_are_unreadable_either_way() -> None:
    data = encode_jpeg(noise_picture(4, 640, 480))
    with pytest.raises(Unreadable, match="unreadable picture: OSError"):
        decode_view(data[: len(data) // 2], crop, Preprocess(224), scaled=True)
    patched = data[:-40] + bytes(20) + data[-20:]  # what simplejpeg finds fault with and Pillow does not
    exact, scaled = (decode_view(patched, crop, Preprocess(224), scaled=scaled) for scaled in (False, True))
    assert torch.equal(exact, scaled)


def test_preprocess_goes_through_json() -> None:
    preprocess = Preprocess(96, resize="squash")
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
