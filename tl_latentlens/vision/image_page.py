"""Pages and pictures of the visual tokens of an image; how they are drawn is left to `views.image`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.lens.page_head import reading_head
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.files import output_path
from tl_latentlens.views.grids import ImageGrid, LensGrid, Pixels
from tl_latentlens.views.image import draw_image, image_page
from tl_latentlens.views.optional import pillow
from tl_latentlens.vision.patch_grid import PatchGrid

_MAX_LOG_PROPORTION = 0.02  # Most that the logarithms of a picture's proportions and of its grid's may differ.


def image_to_html(result: LensResult, grid: PatchGrid, picture: Any, path: str | Path) -> Path:
    """Write one page: the image with its grid, in each patch the word that a lens read, and a slider over the layers.

    Color is the similarity of the nearest neighbor, or another lens's score. A
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
    path = output_path(path)
    path.write_text(patches_page(result, grid, picture), encoding="utf-8")
    return path


def patches_page(result: LensResult, grid: PatchGrid, picture: Any, *, call: str = "") -> str:
    """The page that `image_to_html` writes; its head names `call`, the command that made it, where there is one.

    Raises:
        InvalidInputError: As `image_to_html`.
    """
    image = image_grid(result, grid, picture)
    return image_page(image, reading_head(result.found, result.words, [image.grid], call=call, image=True))


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
    path = output_path(path)
    if path.suffix.lower() != ".png":
        raise InvalidInputError(f"got {path.name}; expected a name that ends in .png")
    image = image_grid(result, grid, picture)
    image.grid.require_lens(lens)
    hook_names = image.grid.hook_names
    name = hook_names[-1] if hook_name is None else hook_name
    if name not in hook_names:
        raise UnknownHookError(f"{name!r} was not decoded; decoded hook names: {list(hook_names)}")
    levels = image.places[:, 0]
    patches = levels == (levels.max() if level is None else level)
    if not patches.any():
        raise InvalidInputError(f"got level={level}; this image's tokens are at {np.unique(levels).tolist()}")
    draw_image(image, lens, hook_names.index(name), patches, font).save(path, "PNG")
    return path


def image_grid(result: LensResult, grid: PatchGrid, picture: Any) -> ImageGrid:
    """The patches of an image with what was read of each, as views draw them.

    Raises:
        MissingExtraError: A file, without Pillow.
        InvalidInputError: As `image_to_html`.
    """
    shown = pixels(picture)
    grid, lens_grid, tokens = read_patches(result, grid, shown)
    places = np.stack([grid.levels, grid.rows, grid.columns], -1)[tokens]
    levels = [f"{kind}, {rows} × {columns}" for kind, (rows, columns) in zip(("whole", "tiles"), grid.shapes, strict=False)]
    return ImageGrid(shown, grid.width, grid.height, grid.boxes[tokens], places, levels, lens_grid)


def pixels(picture: Any) -> Pixels:
    """A picture as bytes [height, width, 3].

    Raises:
        MissingExtraError: A file, without Pillow.
        InvalidInputError: Another shape, or numbers outside [0, 1], as a processor's normalised pixel_values are.
    """
    if isinstance(picture, str | Path):
        with pillow().open(picture) as file:
            picture = file.convert("RGB")
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


def read_patches(
    result: LensResult, grid: PatchGrid, picture: Pixels
) -> tuple[PatchGrid, LensGrid, Int[np.ndarray, " patches"]]:
    """The grid on the picture, what was read of its patches, and which of the grid's tokens those are.

    Raises:
        InvalidInputError: A picture of other proportions than the grid's, or no visual token of the image was decoded.
    """
    height, width = picture.shape[:2]
    if abs(np.log(width / height * grid.height / grid.width)) > _MAX_LOG_PROPORTION:
        raise InvalidInputError(
            f"got a picture of {width} × {height} pixels and the grid of a {grid.width} × {grid.height} image; where the "
            f"processor squeezed the picture, give grid.on({height}, {width}); where it cut out the middle (do_center_crop, as "
            f"for LLaVA 1.5), grid.on({height}, {width}, center_crop=True)"
        )
    lens_grid = result.grid(grid.batch)
    tokens = np.flatnonzero(grid.is_patch & np.isin(grid.positions, lens_grid.positions))
    if not len(tokens):
        raise InvalidInputError(
            f"no visual token of this image was decoded, positions {grid.positions[0]} to {grid.positions[-1]}; decode them: "
            "latentlens_hooks(index, positions='image')"
        )
    columns = np.searchsorted(lens_grid.positions, grid.positions[tokens])
    # Visual tokens are far from all tokens of text, also where their neighbors name the object: `known` says nothing of them.
    lens_grid = replace(lens_grid.select_positions(columns), known=None, use_chances=None)
    return grid.on(height, width), lens_grid, tokens
