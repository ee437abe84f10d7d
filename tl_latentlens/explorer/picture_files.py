"""Pictures in files that users upload, read with Pillow and with limits on what a file may ask for."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.views.grids import Pixels
from tl_latentlens.views.optional import pillow
from tl_latentlens.vision.image_page import pixels

_MAX_SIDE = 1600  # pixels of the longer side; larger pictures are made smaller before the model sees them
_MAX_PIXELS = 64_000_000  # a file of more pixels would take gigabytes before it is made smaller
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")  # Pillow knows others, which run programs, or fetch


def read_picture(data: bytes, name: str) -> Pixels:
    """The picture in a file, upright, on white where it is transparent, and made smaller where it is large.

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
        opened.draft("RGB", (_MAX_SIDE, _MAX_SIDE))  # a JPEG file is read at a fraction of its size
        upright = ImageOps.exif_transpose(opened)
        upright.thumbnail((_MAX_SIDE, _MAX_SIDE))
        rgba = upright.convert("RGBA")
        return pixels(image.alpha_composite(image.new("RGBA", rgba.size, "white"), rgba))


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
