"""Encoded pictures into uint8 pixels at a tower's size. Axes: h w pixels, s the tower's side.

Pictures stay uint8 up to the device. Everything is decoded exactly, unless training asks for scaled decoding.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

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
REDUCTIONS = (8, 4, 2)
"""By which scaled decoding may divide: libjpeg-turbo's n/8 in between are slower than decoding everything."""


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


class View(NamedTuple):
    """A box of a picture, and the (height, width) that it is resized to."""

    top: int
    left: int
    height: int
    width: int
    to: tuple[int, int]

    def reduction(self) -> int:
        """The largest factor a picture can be divided by so that the box still holds what it is resized to."""
        spare = min(self.height // self.to[0], self.width // self.to[1])
        return next((factor for factor in REDUCTIONS if factor <= spare), 1)

    def reduced(self, factor: int) -> View:
        """The box on the picture divided by `factor`: each edge at the nearest pixel."""
        top, left = round(self.top / factor), round(self.left / factor)
        bottom, right = round((self.top + self.height) / factor), round((self.left + self.width) / factor)
        return View(top, left, bottom - top, right - left, self.to)


def decode(data: bytes, preprocess: Preprocess) -> UInt8[Tensor, "3 s s"]:
    """Encoded picture → the pixels a tower is evaluated on. Raises Unreadable."""
    return fit(read_pixels(data), preprocess)


def decode_view(
    data: bytes, view_of: Callable[[int, int], View], preprocess: Preprocess, *, scaled: bool = False
) -> UInt8[Tensor, "3 s s"]:
    """Encoded picture → the view that `view_of(height, width)` chooses. Raises Unreadable.

    `scaled`: the decoder divides large JPEGs by 2, 4 or 8, where enough pixels are left, before they are resized. Edges
    of the box move by half that many pixels at most. Photographs of 640 x 480 and above are then off by 0.3 to 0.9
    levels on average against the same box decoded exactly, at sharp edges by up to 32 (size 224; docs/log.md).
    """
    view = None
    if scaled and (shape := _jpeg_shape(data)):
        view = view_of(*shape)
        factor = view.reduction()
        if factor > 1:
            height, width = (-(-side // factor) for side in shape)
            with suppress(ValueError):
                pixels = channels_first(simplejpeg.decode_jpeg(data, min_height=height, min_width=width))
                return show(pixels, view.reduced(factor), preprocess)
    pixels = read_pixels(data)
    _, height, width = pixels.shape
    return show(pixels, view or view_of(height, width), preprocess)


def decode_views(
    data: bytes, views_of: Sequence[Callable[[int, int], View]], preprocess: Preprocess, *, scaled: bool = False
) -> list[UInt8[Tensor, "3 s s"]]:
    """What `decode_view` makes of each; exact ones share one decoding. Raises Unreadable."""
    if scaled:
        return [decode_view(data, view_of, preprocess, scaled=True) for view_of in views_of]
    pixels = read_pixels(data)
    _, height, width = pixels.shape
    return [show(pixels, view_of(height, width), preprocess) for view_of in views_of]


def read_pixels(data: bytes) -> UInt8[Tensor, "3 h w"]:
    """Encoded picture → its RGB pixels (a channels-last view, which the resize is fastest on). Raises Unreadable.

    Plain JPEGs go through simplejpeg, Pillow's own decoder without Pillow around it; everything else, and whatever it
    finds fault with, through Pillow, which is more patient and says what is wrong.
    """
    if _jpeg_shape(data):
        with suppress(ValueError):
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
    _, height, width = pixels.shape
    return show(pixels, whole(height, width, preprocess), preprocess)


def whole(height: int, width: int, preprocess: Preprocess) -> View:
    """The view of the evaluation transform."""
    size, short = preprocess.size, min(height, width)
    if preprocess.resize == "squash":
        return View(0, 0, height, width, (size, size))
    return View(0, 0, height, width, (int(size * height / short), int(size * width / short)))


def show(pixels: UInt8[Tensor, "3 h w"], view: View, preprocess: Preprocess) -> UInt8[Tensor, "3 s s"]:
    """Cut out the view's box, resize it, and of what that leaves too long keep the centre."""
    size, (height, width) = preprocess.size, view.to
    box = pixels[:, view.top : view.top + view.height, view.left : view.left + view.width]
    box = resize(box, height, width, preprocess.interpolation)
    if view.to == (size, size):
        return box
    top, left = round((height - size) / 2), round((width - size) / 2)
    return box[:, top : top + size, left : left + size]


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that simplejpeg decodes as Pillow does."""
    if data.startswith(JPEG):
        with suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours in ("YCbCr", "Gray") and _size_fault(int(width), int(height)) is None:
                return int(height), int(width)
    return None


def _size_fault(width: int, height: int) -> str | None:
    if width * height > MAX_PIXELS:
        return f"oversized picture: {width}x{height} is more than {MAX_PIXELS} pixels"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"oversized picture: {width}x{height} has sides more than 1:{MAX_ASPECT}"
    return None
