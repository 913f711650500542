"""Pictures into pixels: within a level of Pillow's own resize, and every broken file one counted reason."""

from __future__ import annotations

import io
import json
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data.augment import RATIO, TRIES, crop_box, random_crop
from clipkit.data.build import encode_jpeg
from clipkit.data.decode import Preprocess, decode, fit, read_picture, read_pixels, to_pixels
from clipkit.data.members import Unreadable
from clipkit.data.seeds import uniform

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
    pixels = to_pixels(noise_picture(6, 200, 150))
    same = [random_crop(pixels, Preprocess(32), 0.5, 0, "crop", 1, 2) for _ in range(2)]
    other = random_crop(pixels, Preprocess(32), 0.5, 0, "crop", 2, 2)
    assert torch.equal(*same) and not torch.equal(same[0], other) and other.shape == (3, 32, 32)


def test_a_crop_is_pillows() -> None:
    picture = noise_picture(7, 200, 150)
    top, left, height, width = crop_box(150, 200, 0.5, uniform(4 * TRIES, "key"))
    expected = picture.crop((left, top, left + width, top + height)).resize((48, 48), Image.Resampling.BICUBIC)
    assert_close(random_crop(to_pixels(picture), Preprocess(48), 0.5, "key"), expected)


def test_preprocess_goes_through_json() -> None:
    preprocess = Preprocess(96, resize="squash")
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
