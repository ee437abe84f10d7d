"""The visual tokens of an image, each patch with what a lens read there: one self-contained HTML file, or a PNG (Pillow)."""

import base64
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from einops import reduce
from jaxtyping import Bool, Float, Int, UInt8

from tl_latentlens.errors import InvalidInputError, MissingExtraError, UnknownHookError
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.page import filled, sheet_data, target
from tl_latentlens.views.sheet import LENSES, Sheet, columns_of, require_lens, sheet_of, span, whole_words
from tl_latentlens.views.text import short_hook_name
from tl_latentlens.vision.patch_grid import PatchGrid

_LARGEST = 1600  # pixels of a picture's longer side in a page; larger ones are averaged down
_SQUEEZED = 0.02  # most that a picture's proportions may differ from those of its grid
_HUES = {"latentlens": (37, 99, 235), "logit_lens": (234, 88, 12), "embedding_lens": (22, 163, 74)}  # as in image.html
_TINT = 110  # of 255, the most that color covers of the picture
_CELL, _CAPTION, _SMALLEST = 76, 40, 9  # pixels of a PNG's patch, of the line below, and of its smallest letters

Pixels = UInt8[np.ndarray, "height width 3"]


def image_to_html(result: LensResult, grid: PatchGrid, picture: Any, path: str | Path) -> Path:
    """Write one page: the image with its grid, in each patch the word that a lens read, and a slider over the layers.

    Color is the similarity (of calibrated results -log10 of the chance) of the nearest neighbor, or another lens's score. A
    click, a tap or the arrow keys choose a patch, whose neighbors stand beside it in their contexts, with the tokens of the
    logit lens and the embedding lens. The file needs no network, and follows the light or dark setting of its reader.

    Args:
        result: A run's readings, `latentlens_hooks(index, positions="image")`.
        grid: Of the image, from `patch_grids`.
        picture: The image: an array or tensor, [height, width, 3] or [3, height, width], of bytes or of numbers from 0 to 1;
            a PIL image; or a file (which takes Pillow). Of any size, in the proportions of the grid's.
        path: The file to write.

    Returns:
        The file's path.

    Raises:
        InvalidInputError: A picture of other proportions, no visual token of the image decoded, or no such folder.
    """
    path = target(path)
    path.write_text(image_page(result, grid, picture), encoding="utf-8")
    return path


def image_page(result: LensResult, grid: PatchGrid, picture: Any) -> str:
    """The page that `image_to_html` writes."""
    shown = pixels(picture)
    grid, sheet, tokens = read_patches(result, grid, shown)
    image = {"picture": picture_uri(shown), **patch_data(grid, tokens)}
    return filled("image.html", {**sheet_data([sheet]), "image": image})


def picture_uri(picture: Pixels) -> str:
    """A picture as a data URI, made smaller where it is large."""
    share = max(1, -(-max(picture.shape) // _LARGEST))
    return "data:image/png;base64," + base64.b64encode(_png(_smaller(picture, share))).decode()


def patch_data(grid: PatchGrid, tokens: Int[np.ndarray, " patches"]) -> dict[str, Any]:
    """What the script of a page must know of the patches of a grid: boxes in percent and in pixels, and their places."""
    boxes = 100 * grid.boxes[tokens] / ([grid.width, grid.height] * 2)
    places = np.stack([grid.levels, grid.rows, grid.columns], -1)[tokens]
    return {
        "width": grid.width,
        "height": grid.height,
        "boxes": boxes.round(4).tolist(),
        "pixels": grid.boxes[tokens].round(1).tolist(),
        "places": places.tolist(),
        "levels": [
            f"{kind}, {rows} × {columns}" for kind, (rows, columns) in zip(("whole", "tiles"), grid.shapes, strict=False)
        ],
    }


def image_to_png(
    result: LensResult,
    grid: PatchGrid,
    picture: Any,
    path: str | Path,
    *,
    hook_name: str | None = None,
    lens: str = "latentlens",
    level: int | None = None,
    font: str | Path | None = None,
) -> Path:
    """Write a PNG of one layer: the image with its grid, in each patch the word that a lens read, colored by similarity.

    Args:
        result: A run's readings.
        grid: Of the image.
        picture: The image; see `image_to_html`.
        path: The file to write.
        hook_name: Which activation; None: the last that was decoded.
        lens: "latentlens", "logit_lens" or "embedding_lens".
        level: 0 for the whole image, 1 for its tiles; None: the finest that was decoded.
        font: A TrueType file, for words in scripts that Pillow's own font lacks (it has Latin letters).

    Returns:
        The file's path.

    Raises:
        MissingExtraError: Pillow is not installed.
        UnknownHookError: The hook name was not decoded.
        InvalidInputError: As `image_to_html`; a lens that was not read, a level that the grid lacks, another ending than .png.
    """
    path = target(path)
    if path.suffix.lower() != ".png":
        raise InvalidInputError(f"got {path.name}; expected a name that ends in .png")
    shown = pixels(picture)
    grid, sheet, tokens = read_patches(result, grid, shown)
    require_lens(sheet, lens)
    name = sheet.hook_names[-1] if hook_name is None else hook_name
    if name not in sheet.hook_names:
        raise UnknownHookError(f"{name!r} was not decoded; decoded hook names: {list(sheet.hook_names)}")
    here = np.flatnonzero(grid.levels[tokens] == (grid.levels[tokens].max() if level is None else level))
    if not len(here):
        raise InvalidInputError(f"got level={level}; this image's tokens are at {np.unique(grid.levels[tokens]).tolist()}")
    layer = sheet.hook_names.index(name)
    values = sheet.values(lens)
    low, high = span([values], sheet.scale(lens))
    shares = np.clip((values[layer, here] - low) / (high - low), 0, 1)
    words = _words(columns_of(sheet, here), lens)[layer]
    faint = sheet.faint[layer, here] & (lens == "latentlens")
    drawn = _draw(shown, grid, grid.boxes[tokens[here]], words, shares, faint, _HUES[lens], font)
    scale = sheet.scale(lens).replace("−log₁₀", "-log10")  # Pillow's own font has no such signs
    caption = f"{LENSES[lens]}, {short_hook_name(name)}"
    _caption(drawn, caption, f"{scale} {low:.2f}", f"{high:.2f}", _HUES[lens], font).save(path, "PNG")
    return path


def pixels(picture: Any) -> Pixels:
    """A picture as bytes [height, width, 3].

    Raises:
        MissingExtraError: A file, without Pillow.
        InvalidInputError: Another shape, or numbers outside [0, 1], as a processor's normalised pixel_values are.
    """
    if isinstance(picture, str | Path):
        with pillow().open(picture) as opened:
            picture = opened.convert("RGB")
    if hasattr(picture, "convert"):
        picture = picture.convert("RGB")
    array = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    array = np.repeat(array[..., None], 3, -1) if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise InvalidInputError(f"got a picture of shape {array.shape}; expected [height, width, 3] or [3, height, width]")
    if array.dtype == np.uint8:
        return array
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise InvalidInputError(
            f"got a picture with numbers from {array.min():.3g} to {array.max():.3g}; expected bytes, or numbers from 0 to 1: "
            "the picture itself, not the processor's normalised pixel_values"
        )
    return (255 * array).round().astype(np.uint8)


def read_patches(result: LensResult, grid: PatchGrid, picture: Pixels) -> tuple[PatchGrid, Sheet, Int[np.ndarray, " patches"]]:
    """The grid on the picture, what was read of its patches, and which tokens those are."""
    height, width = picture.shape[:2]
    if abs(np.log(width / height * grid.height / grid.width)) > _SQUEEZED:
        raise InvalidInputError(
            f"got a picture of {width} × {height} pixels and the grid of a {grid.width} × {grid.height} image; where the "
            f"processor squeezed the picture, give grid.on({height}, {width}); where it cut out the middle (do_center_crop, as "
            f"for LLaVA 1.5), grid.on({height}, {width}, center_crop=True)"
        )
    sheet = sheet_of(result, grid.batch)
    tokens = np.flatnonzero(grid.is_patch & np.isin(grid.positions, sheet.positions))
    if not len(tokens):
        raise InvalidInputError(
            f"no visual token of this image was decoded, positions {grid.positions[0]} to {grid.positions[-1]}; decode them: "
            "latentlens_hooks(index, positions='image')"
        )
    return grid.on(height, width), columns_of(sheet, np.searchsorted(sheet.positions, grid.positions[tokens])), tokens


def _words(sheet: Sheet, lens: str) -> list[list[str]]:
    """The word that each cell shows, [hook name][pos]."""
    if lens != "latentlens":
        return [[word.strip() for word in line] for line in sheet.best(lens)]
    whole = whole_words(sheet.index, np.unique(sheet.rows[..., 0]).tolist())
    return [[whole[row] for row in line] for line in sheet.rows[..., 0].tolist()]


def _smaller(picture: Pixels, k: int) -> Pixels:
    """The means of squares of k × k pixels."""
    height, width = (size // k * k for size in picture.shape[:2])
    return reduce(picture[:height, :width].astype(np.float32), "(h a) (w b) c -> h w c", "mean", a=k, b=k).astype(np.uint8)


def _png(picture: Pixels) -> bytes:
    """The bytes of a PNG file: 8 bits, RGB, no filter (each line begins with a 0)."""
    height, width = picture.shape[:2]
    lines = np.pad(picture.reshape(height, -1), ((0, 0), (1, 0)))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pillow() -> Any:
    """The module `PIL.Image`.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError('pictures in files need Pillow: pip install "tl-latentlens[vision]"') from error
    return Image


def _font(size: float, file: str | Path | None) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size) if file is None else ImageFont.truetype(str(file), size)


def _draw(
    picture: Pixels,
    grid: PatchGrid,
    boxes: Float[np.ndarray, "patches 4"],
    words: list[str],
    shares: Float[np.ndarray, " patches"],
    faint: Bool[np.ndarray, " patches"],
    hue: tuple[int, int, int],
    font: str | Path | None,
) -> Any:
    """The picture, enlarged until words fit its patches, each tinted and with its word on a light ground."""
    image = pillow()
    from PIL import ImageDraw

    zoom = max(1.0, _CELL / float((boxes[:, 2] - boxes[:, 0]).max()))
    size = round(zoom * grid.width), round(zoom * grid.height)
    base = image.fromarray(picture).resize(size, image.Resampling.NEAREST if zoom > 4 else image.Resampling.BICUBIC)
    layer = image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    for box, word, share, pale in zip((zoom * boxes).round().tolist(), words, shares.tolist(), faint.tolist(), strict=True):
        x0, y0, x1, y1 = box
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), (*hue, round(_TINT * share)), (255, 255, 255, 110))
        room = x1 - x0 - 6
        letters = next((f for size in range(14, _SMALLEST - 1, -1) if (f := _font(size, font)).getlength(word) <= room), None)
        letters = letters or _font(_SMALLEST, font)
        while word and letters.getlength(word) > room:
            word = word[: -2 if word.endswith("…") else -1] + "…" if len(word) > 2 else ""
        if not word:
            continue
        middle = (x0 + x1) / 2, y1 - 4 - letters.size / 2
        left, top, right, bottom = draw.textbbox(middle, word, letters, anchor="mm")
        draw.rounded_rectangle((left - 2, top - 2, right + 2, bottom + 2), 3, (255, 255, 255, 215))
        draw.text(middle, word, (20, 20, 24, 110 if pale else 255), letters, anchor="mm")
    return image.alpha_composite(base.convert("RGBA"), layer).convert("RGB")


def _caption(drawn: Any, text: str, low: str, high: str, hue: tuple[int, int, int], font: str | Path | None) -> Any:
    """The drawing with a line below it: what is shown, and the color scale."""
    image = pillow()
    from PIL import ImageDraw

    letters, margin, bar = _font(14, font), 10, 70
    left, right = (letters.getlength(one) for one in (low, high))
    scale = left + bar + right + 4 * margin
    lines = 1 if letters.getlength(text) + scale + margin <= drawn.width else 2
    width = max(drawn.width, round(max(letters.getlength(text) + 2 * margin, scale)))
    whole = image.new("RGB", (width, drawn.height + lines * _CAPTION), "white")
    whole.paste(drawn)
    draw = ImageDraw.Draw(whole)
    draw.text((margin, drawn.height + _CAPTION / 2), text, (20, 20, 24), letters, anchor="lm")
    x, y = (margin if lines == 2 else width - scale + margin), drawn.height + (lines - 0.5) * _CAPTION
    draw.text((x, y), low, (20, 20, 24), letters, anchor="lm")
    x += left + margin
    for i in range(bar):
        tint = tuple(round(255 - _TINT / 255 * i / bar * (255 - one)) for one in hue)
        draw.line((x + i, y - 6, x + i, y + 6), tint)
    draw.text((x + bar + margin, y), high, (20, 20, 24), letters, anchor="lm")
    return whole
