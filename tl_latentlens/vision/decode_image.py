"""An image read from its file to its words: the model is run on it, and its visual tokens are decoded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from rich.console import Group

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.cell import table_of_cells
from tl_latentlens.lens.lens_hooks import latentlens_hooks
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.data import LensCell
from tl_latentlens.views.files import output_path
from tl_latentlens.views.grids import Pixels
from tl_latentlens.views.terminal.lens import patch_tables
from tl_latentlens.views.text import layer_headings
from tl_latentlens.vision.image_page import patches_page
from tl_latentlens.vision.patch_choice import clearest_patches
from tl_latentlens.vision.picture_files import read_picture
from tl_latentlens.vision.prompted_images import PromptedImages
from tl_latentlens.vision.scenes.connector import SceneModel
from tl_latentlens.vision.scenes.seen import scene_of_picture, shown_scene
from tl_latentlens.vision.shown_image import ShownImage

_TIE = 1e-3  # Similarities, of 1 at most, decide between equals alone.


@dataclass(frozen=True, eq=False)
class ImageReading:
    """The readings of all visual tokens of an image.

    Attributes:
        image: The image as the model was given it.
        prompt: The prompt that it was given with; empty for the embedded model, which has none.
        result: The readings.
    """

    image: ShownImage
    prompt: str
    result: LensResult

    def clearest(self) -> Int[np.ndarray, " tokens"]:
        """Of each ninth of the image the patch (number in the grid) whose nearest token the fewest patches share.

        Background is alike all over an image, and reads alike. The mean of the layers counts; of equals the nearest is taken.
        """
        grid, result = self.image.grid, self.result
        cells = np.flatnonzero(result.positions[:, 0] == grid.batch)
        places = cells[np.searchsorted(result.positions[cells, 1], grid.positions)]
        scores = np.zeros(len(grid))
        for found in map(result.found.__getitem__, result.hook_names):
            tokens = found.index.bank_rows.token_ids()[found.rows[:, 0].cpu().numpy()[places]]
            _, place, n_patches = np.unique(tokens, return_inverse=True, return_counts=True)
            scores += _TIE * found.similarities[:, 0].cpu().numpy()[places] - n_patches[place]
        return clearest_patches(grid, scores)

    def to_rich(self, patches: Iterable[int], neighbors: int | None = None, *, width: int | None = None) -> Group:
        """A table for each layer, a line for each of some patches (numbers in the grid), beside the logit lens.

        Args:
            patches: Which.
            neighbors: Most neighbors of each; None: all that were read.
            width: Of a table, in characters; None: the terminal's.
        """
        grid, chosen = self.image.grid, list(patches)
        names = self.result.hook_names
        labels, kind = layer_headings(names)
        titles = [f"layer {label}" if kind == "layer" else name for label, name in zip(labels, names, strict=True)]
        headings = [self._heading(token) for token in chosen]
        positions = grid.positions[chosen].tolist()
        cells = [[self._cell(name, pos, neighbors) for pos in positions] for name in names]
        counted = [f"{title}: {len(chosen)} of {len(grid):,} visual tokens" for title in titles]
        return patch_tables([(title, headings, line) for title, line in zip(counted, cells, strict=True)], width)

    def to_dataframe(self, patches: Iterable[int]) -> pd.DataFrame:
        """The lines of `LensResult.to_dataframe` of some patches, behind patch, level, row, column (from 0), x0, y0, x1, y1."""
        grid, result = self.image.grid, self.result
        places = grid.to_dataframe().rename(columns={"token": "patch", "position": "pos"}).iloc[list(patches)]
        cells = [result.cell(name, pos, grid.batch) for name in result.hook_names for pos in places["pos"].tolist()]
        return places.merge(table_of_cells(cells), on="pos").sort_values("patch", kind="stable", ignore_index=True)

    def to_html(self, path: str | Path, *, call: str = "") -> Path:
        """Write all patches as a page, as `image_to_html` does.

        Args:
            path: The file.
            call: The command that made the reading, for the page's head.
        """
        path = output_path(path)
        path.write_text(patches_page(self.result, self.image.grid, self.image.picture, call=call), encoding="utf-8")
        return path

    def _cell(self, hook_name: str, pos: int, neighbors: int | None) -> LensCell:
        """A cell with the logit lens alone beside the neighbors: tables are narrow."""
        cell = self.result.lens_cell(hook_name, pos, self.image.grid.batch, neighbors)
        return replace(cell, lenses={lens: read for lens, read in cell.lenses.items() if lens == "logit_lens"})

    def _heading(self, token: int) -> str:
        grid = self.image.grid
        left, top, right, bottom = grid.boxes[token].round().astype(int).tolist()
        level = "whole, " if grid.levels.max() and not grid.levels[token] else ""
        place = f"row {grid.rows[token]}, column {grid.columns[token]}"
        return f"{token}\n{level}{place}\n{left},{top} to {right},{bottom}"


def read_image_file(path: str | Path) -> Pixels:
    """The picture in an image file, at its full size.

    Args:
        path: A PNG, JPEG, GIF, WebP, BMP or TIFF file; of an animation the first frame is read.

    Raises:
        InvalidInputError: It is missing, or no image.
        MissingExtraError: Pillow is not installed.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"cannot read the image {path}: {error.strerror or error}") from error
    return read_picture(data, path.name, max_side=None)


def decode_image(
    model: Any,
    picture: Pixels,
    index: ContextualIndex,
    *,
    name: str = "image",
    prompt: str = "",
    processor: Any = None,
    hook_names: Sequence[str] | None = None,
    top_k: int = 5,
    words: int = 8,
) -> ImageReading:
    """Read a picture by a vision-language model: its visual tokens, each by its nearest words in a bank of text.

    Args:
        model: A TransformerBridge of a vision-language model, or the model that `load_demo_vlm` gives.
        picture: From `read_image_file`.
        index: Of the model's text.
        name: Of the picture, for titles and errors.
        prompt: What is asked about the image: a text that the processor's chat template frames, or one with its placeholder.
        processor: A processor of transformers; None: the model's own.
        hook_names: As in `latentlens_hooks`.
        top_k: Neighbors of each visual token.
        words: Nearest other words of each; 0: none.

    Raises:
        InvalidInputError: A model that reads text alone, or a picture that the model cannot be shown.
        ModelMismatchError: The bank is of another model.
    """
    source = model if isinstance(model, SceneModel) else _prompted_images(model, processor)
    language_model = model.model if isinstance(model, SceneModel) else model
    index.check_model(language_model)
    if isinstance(source, SceneModel):
        height, width = picture.shape[:2]
        prompt, title = "", f"{name}: {width} × {height} pixels"
        image = shown_scene(source, scene_of_picture(picture, name), title)
    else:
        prompt = source.make_prompt(prompt)
        image = source.show(picture, prompt, name)
    hooks = latentlens_hooks(
        index,
        hook_names,
        top_k=top_k,
        embedding_lens=True,
        positions=image.mask,
        calibrate=False,  # visual tokens are far from all tokens of text
        words=words,
        model=language_model,
    )
    with torch.no_grad():
        image.run(fwd_hooks=hooks)
    return ImageReading(image, prompt, hooks.result)


def _prompted_images(model: Any, processor: Any) -> PromptedImages:
    try:
        return PromptedImages(model, processor)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"this {type(model).__name__} reads text alone: the model in it has no image token. Expected a TransformerBridge "
            "(TransformerLens 3 or newer) of a vision-language model, such as llava-hf/llava-1.5-7b-hf, or `demo-vlm`, which "
            "sees drawn scenes"
        ) from error
