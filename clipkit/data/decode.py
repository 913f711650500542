"""Encoded pictures into uint8 pixels at a tower's size. Axes: h w pixels, s the tower's side.

Pictures stay uint8 up to the device.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from clipkit.data.members import Unreadable
from clipkit.data.resize import channels_first, resize

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""Only what pictures on the web come in: Pillow's rarer readers are a needless risk on downloaded bytes."""
JPEG = b"\xff\xd8\xff"
MAX_PIXELS = 89_478_485
"""Pillow's own border of a decompression bomb: 256 MiB of RGB."""
MAX_ASPECT = 100


@dataclass(frozen=True)
class Preprocess:
    """How a tower wants its pictures; `mean` and `std` are applied by the model, on its device."""

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize: Literal["shortest", "squash"] = "shortest"
    """`shortest`: the short side becomes `size`, the centre is kept; `squash`: both sides become `size`."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of `to_dict`, also after a passage through JSON."""
        fixed: dict[str, Any] = {"mean": tuple(values["mean"]), "std": tuple(values["std"])}
        return cls(**{**values, **fixed})


def decode(data: bytes, preprocess: Preprocess) -> UInt8[Tensor, "3 s s"]:
    """Encoded picture → the pixels a tower is evaluated on. Raises Unreadable."""
    return fit(read_pixels(data), preprocess)


def read_pixels(data: bytes) -> UInt8[Tensor, "3 h w"]:
    """Encoded picture → its RGB pixels (a channels-last view, which the resize is fastest on). Raises Unreadable.

    Plain JPEGs go through simplejpeg, Pillow's own decoder without Pillow around it; everything else, and whatever it
    finds fault with, through Pillow, which is more patient and says what is wrong.
    """
    if data.startswith(JPEG):
        with suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "Gray") and _size_fault(int(width), int(height)) is None:
                return channels_first(simplejpeg.decode_jpeg(data))
    return to_pixels(read_picture(data))


def read_picture(data: bytes) -> Image.Image:
    """Encoded picture → fully decoded RGB picture. Raises Unreadable with the reason."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if fault := _size_fault(*picture.size):
            raise Unreadable(fault)
        if "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return picture.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"oversized picture: {error}") from None
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable(f"unreadable picture: {len(data)} bytes that are none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged bytes
        raise Unreadable(f"unreadable picture: {type(error).__name__}: {error}") from None


def to_pixels(picture: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """An RGB picture as a tensor (a channels-last view)."""
    return channels_first(np.array(picture))


def fit(pixels: UInt8[Tensor, "3 h w"], preprocess: Preprocess) -> UInt8[Tensor, "3 s s"]:
    """The evaluation transform: resize, then cut out the centre (as torchvision's Resize and CenterCrop do)."""
    size, (height, width) = preprocess.size, pixels.shape[1:]
    if preprocess.resize == "squash":
        return resize(pixels, size, size, preprocess.interpolation)
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    pixels = resize(pixels, height, width, preprocess.interpolation)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[:, top : top + size, left : left + size]


def _size_fault(width: int, height: int) -> str | None:
    if width * height > MAX_PIXELS:
        return f"oversized picture: {width}x{height} is more than {MAX_PIXELS} pixels"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"oversized picture: {width}x{height} has sides more than 1:{MAX_ASPECT}"
    return None
