"""Pictures in files that users give, read with Pillow and with limits on what a file may ask for."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.views.grids import Pixels
from tl_latentlens.views.optional import pillow
from tl_latentlens.vision.image_page import pixels

MAX_UPLOADED_SIDE = 1600  # pixels of the longer side
_MAX_PIXELS = 64_000_000  # a file of more pixels would take gigabytes before it is made smaller
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")  # Pillow knows others, which run programs, or fetch


def read_picture(data: bytes, name: str, max_side: int | None = MAX_UPLOADED_SIDE) -> Pixels:
    """The picture in a file, upright, on white where it is transparent; of an animation the first frame.

    Args:
        data: The bytes of the file.
        name: Of the file, for errors.
        max_side: Most pixels of the longer side; a larger picture is made smaller. None: as it is.

    Raises:
        MissingExtraError: Pillow is not installed.
        InvalidInputError: It is no picture, or has too many pixels.
    """
    image = pillow()
    from PIL import ImageOps

    with _as_input_error(name, image.DecompressionBombError):
        opened = image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = opened.size
    if width * height > _MAX_PIXELS:
        raise InvalidInputError(
            f"{name} has {width:,} × {height:,} pixels; at most {_MAX_PIXELS // 10**6} million can be read: make it smaller"
        )
    with _as_input_error(name):
        if max_side is not None:
            opened.draft("RGB", (max_side, max_side))  # a JPEG file is read at a fraction of its size
        upright = ImageOps.exif_transpose(opened)
        if max_side is not None:
            upright.thumbnail((max_side, max_side))
        rgba = _in_eight_bits(upright, image).convert("RGBA")
        return pixels(image.alpha_composite(image.new("RGBA", rgba.size, "white"), rgba))


def _in_eight_bits(opened: Any, image: Any) -> Any:
    """The picture with a byte a channel: Pillow would cut 16-bit grays off at 255.

    Raises:
        ValueError: It holds floats, which do not say what is white.
    """
    if opened.mode == "F":
        raise ValueError("a picture of floats")
    if not opened.mode.startswith("I"):
        return opened
    return image.fromarray((np.asarray(opened).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))


@contextmanager
def _as_input_error(name: str, *further: type[Exception]) -> Iterator[None]:
    """Turn errors of Pillow into one that names the file. Damaged files make Pillow raise all of these."""
    try:
        yield
    except (
        EOFError,
        LookupError,
        OSError,
        OverflowError,
        SyntaxError,
        ValueError,
        struct.error,
        zlib.error,
        *further,
    ) as error:
        raise InvalidInputError(f"{name} cannot be read as an image; PNG, JPEG, GIF, WebP, BMP and TIFF files can") from error
