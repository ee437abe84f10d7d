"""The patches of an image with what a lens read there: one self-contained HTML file, or a picture (Pillow)."""

import base64
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from einops import reduce
from jaxtyping import Bool, Float

from tl_latentlens.views.colors import color_range
from tl_latentlens.views.grids import ImageGrid, LensGrid, Pixels
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.optional import pillow
from tl_latentlens.views.page import grid_data
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.template import render_template
from tl_latentlens.views.text import place_name

_MAX_PAGE_PIXELS = 1600  # Of a picture's longer side in a page; larger ones are averaged down.
_MAX_TINT = 110  # Of 255: the most that color covers of the picture.
_MIN_PATCH_PIXELS = 76  # Of a patch in a drawing.
_CAPTION_PIXELS = 40  # Of a line below a drawing.
_MIN_FONT_SIZE, _MAX_FONT_SIZE = 9, 14
_INK = (20, 20, 24)


def image_page(image: ImageGrid, head: PageHead) -> str:
    """The page: the image with its grid, in each patch the word that a lens read, and a slider over the layers."""
    data = {**grid_data([image.grid]), "image": {"picture": picture_uri(image.pixels), **patch_data(image)}}
    return render_template("image.html", data, head, image_source="data:")


def picture_uri(pixels: Pixels) -> str:
    """A picture as a data URI, made smaller where it is large."""
    factor = max(1, -(-max(pixels.shape) // _MAX_PAGE_PIXELS))
    return "data:image/png;base64," + base64.b64encode(_png(_averaged_down(pixels, factor))).decode()


def patch_data(image: ImageGrid) -> dict[str, Any]:
    """The patches as the script of a page needs them: boxes in percent and in pixels, and their places."""
    boxes = 100 * image.boxes / ([image.width, image.height] * 2)
    return {
        "width": image.width,
        "height": image.height,
        "boxes": boxes.round(4).tolist(),
        "pixels": image.boxes.round(1).tolist(),
        "places": image.places.tolist(),
        "levels": image.levels,
    }


def draw_image(
    image: ImageGrid, lens: str, layer: int, patches: Bool[np.ndarray, " patches"], font: str | Path | None = None
) -> Any:
    """The image as a Pillow picture: in some patches the word that a lens read, colored by its score, and a caption.

    Args:
        image: The image and what was read.
        lens: One of the grid's lenses.
        layer: Which of the grid's hook names.
        patches: True for the patches that are drawn.
        font: A TrueType file; None: Pillow's own font.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    grid, columns = image.grid, np.flatnonzero(patches)
    values, score_name = grid.values(lens), grid.score_name(lens)
    low, high = color_range([values], score_name)
    shares = np.clip((values[layer, columns] - low) / (high - low), 0, 1)
    words, hue = _words(grid.select_positions(columns), lens, layer), LENSES[lens].hue
    drawing = _draw_patches(image, image.boxes[columns], words, shares, hue, font)
    caption = f"{LENSES[lens].label}, {place_name(grid.hook_names[layer])}"
    return _with_caption(drawing, caption, f"{score_name} {low:.2f}", f"{high:.2f}", hue, font)


def _words(grid: LensGrid, lens: str, layer: int) -> list[str]:
    """The word that each patch shows at one hook name."""
    if lens != "latentlens":
        return [token.strip() for token in grid.first_tokens(lens)[layer]]
    row_ids = grid.rows[layer, :, 0]
    words = grid.row_words(row_ids)
    return [words[row] for row in row_ids.tolist()]


def _averaged_down(pixels: Pixels, factor: int) -> Pixels:
    """The means of squares of factor × factor pixels."""
    height, width = (size // factor * factor for size in pixels.shape[:2])
    squares = pixels[:height, :width].astype(np.float32)
    return reduce(squares, "(h a) (w b) c -> h w c", "mean", a=factor, b=factor).astype(np.uint8)


def _png(pixels: Pixels) -> bytes:
    """The bytes of a PNG file: 8 bits, RGB, no filter (each line begins with a 0)."""
    height, width = pixels.shape[:2]
    lines = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    )
    chunks = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _font(size: float, file: str | Path | None) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size) if file is None else ImageFont.truetype(str(file), size)


def _draw_patches(
    image: ImageGrid,
    boxes: Float[np.ndarray, "patches 4"],
    words: list[str],
    shares: Float[np.ndarray, " patches"],
    hue: tuple[int, int, int],
    font: str | Path | None,
) -> Any:
    """The picture, enlarged until words fit its patches, each tinted and with its word on a light ground."""
    pil_image = pillow()
    from PIL import ImageDraw

    zoom = max(1.0, _MIN_PATCH_PIXELS / float((boxes[:, 2] - boxes[:, 0]).max()))
    size = round(zoom * image.width), round(zoom * image.height)
    resampling = pil_image.Resampling.NEAREST if zoom > 4 else pil_image.Resampling.BICUBIC
    base = pil_image.fromarray(image.pixels).resize(size, resampling)
    layer = pil_image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    patches = zip((zoom * boxes).round().tolist(), words, shares.tolist(), strict=True)
    for (x0, y0, x1, y1), word, share in patches:
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), (*hue, round(_MAX_TINT * share)), (255, 255, 255, 110))
        word, letters = _fitted(word, x1 - x0 - 6, font)
        if not word:
            continue
        middle = (x0 + x1) / 2, y1 - 4 - letters.size / 2
        left, top, right, bottom = draw.textbbox(middle, word, letters, anchor="mm")
        draw.rounded_rectangle((left - 2, top - 2, right + 2, bottom + 2), 3, (255, 255, 255, 215))
        draw.text(middle, word, (*_INK, 255), letters, anchor="mm")
    return pil_image.alpha_composite(base.convert("RGBA"), layer).convert("RGB")


def _fitted(word: str, width: float, font: str | Path | None) -> tuple[str, Any]:
    """A word and the largest letters in which it fits; shortened where even the smallest are too wide."""
    sizes = range(_MAX_FONT_SIZE, _MIN_FONT_SIZE - 1, -1)
    letters = next((f for size in sizes if (f := _font(size, font)).getlength(word) <= width), None)
    letters = letters or _font(_MIN_FONT_SIZE, font)
    while word and letters.getlength(word) > width:
        word = word[: -2 if word.endswith("…") else -1] + "…" if len(word) > 2 else ""
    return word, letters


def _with_caption(drawing: Any, text: str, low: str, high: str, hue: tuple[int, int, int], font: str | Path | None) -> Any:
    """The drawing with a line below it: what is shown, and the color scale."""
    pil_image = pillow()
    from PIL import ImageDraw

    letters, margin, bar_width = _font(_MAX_FONT_SIZE, font), 10, 70
    low_width, high_width = (letters.getlength(end) for end in (low, high))
    scale_width = low_width + bar_width + high_width + 4 * margin
    n_lines = 1 if letters.getlength(text) + scale_width + margin <= drawing.width else 2
    width = max(drawing.width, round(max(letters.getlength(text) + 2 * margin, scale_width)))
    whole = pil_image.new("RGB", (width, drawing.height + n_lines * _CAPTION_PIXELS), "white")
    whole.paste(drawing)
    draw = ImageDraw.Draw(whole)
    draw.text((margin, drawing.height + _CAPTION_PIXELS / 2), text, _INK, letters, anchor="lm")
    x = margin if n_lines == 2 else width - scale_width + margin
    y = drawing.height + (n_lines - 0.5) * _CAPTION_PIXELS
    draw.text((x, y), low, _INK, letters, anchor="lm")
    x += low_width + margin
    for i in range(bar_width):
        tint = tuple(round(255 - _MAX_TINT / 255 * i / bar_width * (255 - channel)) for channel in hue)
        draw.line((x + i, y - 6, x + i, y + 6), tint)
    draw.text((x + bar_width + margin, y), high, _INK, letters, anchor="lm")
    return whole
