"""Visual tokens: at which positions of a prompt they stand, and where in the image each of them looks.

What differs from model to model is read from its Hugging Face config and the processor's outputs. Running the model and
decoding its activations are left to `hooks`, pictures of them to `views.image`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, isqrt, sqrt
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.image_tokens import image_positions

_SMALLER = (
    "scale_factor",
    "pixel_shuffle_ratio",
    "downsample_ratio",
)  # of Idefics3, Llama 4, InternVL, which cut images into tiles
_HINT = "give the grid by hand, shapes=[(rows, columns)]"


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The visual tokens of one image, in the order of the prompt, and the part of the image that each of them shows.

    Most models see an image once, at level 0. Those that also cut it into tiles or crops (LLaVA-NeXT, Idefics3, Llama 4) see
    the whole image at level 0 and its details, all tiles laid side by side, at level 1.

    Attributes:
        height, width: Of the image, in pixels. It is the image as the model saw it; `on` moves the boxes to yours.
        positions: Where each token stands in its prompt.
        boxes: Left, top, right and bottom of each token in pixels; NaN for tokens that show no part of the image, such as
            the one that LLaVA-NeXT puts at the end of each row.
        rows, columns: Where each token stands in its grid, from 0; a token at the end of a row stands one past the last column.
        levels: 0 for the whole image, 1 for its details.
        batch: The prompt of the batch that the image is in.
    """

    height: int
    width: int
    positions: Int[np.ndarray, " tokens"]
    boxes: Float[np.ndarray, "tokens 4"]
    rows: Int[np.ndarray, " tokens"]
    columns: Int[np.ndarray, " tokens"]
    levels: Int[np.ndarray, " tokens"]
    batch: int = 0

    @classmethod
    def regular(
        cls, rows: int, columns: int, positions: Any, *, height: int | None = None, width: int | None = None, batch: int = 0
    ) -> "PatchGrid":
        """A grid of equal patches, row after row, for a model whose config does not tell.

        Args:
            rows: Of the grid.
            columns: Of the grid.
            positions: Where the tokens stand in their prompt: numbers, or a mask [pos] (or [batch, pos], then of `batch`).
            height: Of the image in pixels; None: one a row.
            width: Of the image in pixels; None: one a column.
            batch: The prompt of the batch.

        Raises:
            InvalidInputError: Not rows × columns positions.
        """
        at = torch.as_tensor(positions).cpu().numpy()
        at = at[batch] if at.ndim == 2 else at
        at = np.flatnonzero(at) if at.dtype == bool else at.astype(np.int64)
        height, width = height or rows, width or columns
        spans = (_spans(np.linspace(0, size, n + 1)) for size, n in ((height, rows), (width, columns)))
        image = _Image(height, width, [_part(*spans)])
        if len(at) != image.n_tokens:
            raise InvalidInputError(f"got {len(at)} positions; expected {rows} rows × {columns} columns = {image.n_tokens}")
        return image.grid(at, batch)

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        shapes = " and ".join(f"{rows} × {columns}" for rows, columns in self.shapes)
        return f"PatchGrid({shapes} patches of a {self.width} × {self.height} image, batch {self.batch})"

    @property
    def is_patch(self) -> Bool[np.ndarray, " tokens"]:
        """True for tokens that show a part of the image."""
        return ~np.isnan(self.boxes[:, 0])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each level."""
        levels = (self.is_patch & (self.levels == level) for level in np.unique(self.levels))
        return [(int(self.rows[here].max()) + 1, int(self.columns[here].max()) + 1) for here in levels if here.any()]

    def at(self, x: float, y: float) -> Int[np.ndarray, " found"]:
        """The tokens (numbers in this grid) whose box holds a point: one for each level."""
        x0, y0, x1, y1 = self.boxes.T
        return np.flatnonzero((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))

    def inside(self, box: Sequence[float], least: float = 0.5) -> Int[np.ndarray, " found"]:
        """The tokens of which at least a share `least` of their own area lies in a box (left, top, right, bottom).

        Raises:
            InvalidInputError: A box without area.
        """
        left, top, right, bottom = map(float, box)
        if not (left < right and top < bottom):
            raise InvalidInputError(f"got box={tuple(box)}; expected left < right and top < bottom, in pixels")
        x0, y0, x1, y1 = self.boxes.T
        width, height = np.minimum(x1, right) - np.maximum(x0, left), np.minimum(y1, bottom) - np.maximum(y0, top)
        shared = np.clip(width, 0, None) * np.clip(height, 0, None)
        return np.flatnonzero((shared > 0) & (shared >= least * (x1 - x0) * (y1 - y0)))

    def token(self, position: int) -> int:
        """The number in this grid of the token at a position of the prompt.

        Raises:
            InvalidInputError: The position is not of this image.
        """
        found = np.flatnonzero(self.positions == position)
        if not len(found):
            first, last = self.positions[0], self.positions[-1]
            raise InvalidInputError(f"position {position} is no token of this image; its tokens stand from {first} to {last}")
        return int(found[0])

    def on(self, height: int, width: int, *, center_crop: bool = False) -> "PatchGrid":
        """The same tokens on the image as it was before the processor changed its size.

        Args:
            height: Of that image, in pixels.
            width: Of that image, in pixels.
            center_crop: The processor did not squeeze the image but cut out its middle (`do_center_crop`, as CLIP's does
                for LLaVA 1.5).
        """
        scale = np.array([width / self.width, height / self.height])
        if center_crop:
            scale[:] = scale.min()
        away = (np.array([width, height]) - scale * [self.width, self.height]) / 2
        return replace(self, height=height, width=width, boxes=self.boxes * np.tile(scale, 2) + np.tile(away, 2))

    def to_dataframe(self) -> pd.DataFrame:
        """One line a token: token, position, level, row, column, x0, y0, x1, y1."""
        table = {"position": self.positions, "level": self.levels, "row": self.rows, "column": self.columns}
        return pd.DataFrame(
            {"token": range(len(self)), **table, **dict(zip(("x0", "y0", "x1", "y1"), self.boxes.T, strict=True))}
        )


def patch_grids(
    model: Any,
    inputs: Any,
    *,
    tiles: Sequence[tuple[int, int]] | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> list[PatchGrid]:
    """The visual tokens of each image of a run, and where each of them looks, in the order of the images.

    >>> inputs = processor(images=image, text=prompt, return_tensors="pt")      # doctest: +SKIP
    >>> [grid] = patch_grids(bridge, inputs)
    >>> grid.boxes[grid.token(17)]

    Args:
        model: A TransformerBridge of a vision-language model.
        inputs: What the processor gave: `input_ids`, and where the number of tokens depends on the image, its
            `image_grid_thw` (Qwen-VL), `image_sizes` (LLaVA-NeXT, Mistral 3) or `image_position_ids` (Gemma 4). For other
            models the ids alone will do.
        tiles: For models that cut an image into tiles (Idefics3, Llama 4): rows and columns of tiles of each image; (1, 1)
            for one that was left whole.
        shapes: Rows and columns of each image's tokens, where the config does not tell.
        mask: True at the visual tokens; None: where the ids are the model's image token.

    Raises:
        InvalidInputError: Something is missing that the grid depends on, or the ids hold another number of visual tokens
            than the images have.
    """
    fields = inputs if isinstance(inputs, Mapping) or hasattr(inputs, "keys") else {"input_ids": inputs}
    if mask is None:
        if "input_ids" not in fields:
            raise InvalidInputError(f"got inputs with {list(fields.keys())}; expected input_ids among them, or a mask")
        mask = image_positions(model, fields["input_ids"])
    marked = torch.as_tensor(mask).cpu().numpy()
    config = getattr(getattr(model, "original_model", None), "config", None)
    images, listed = _images(config, fields, tiles, shapes, marked)
    grids, given = [], iter(images)
    for batch, line in enumerate(marked):
        positions = np.flatnonzero(line)
        while len(positions):
            image = next(given, None)
            if image is None or image.n_tokens > len(positions):
                expected = "no further image" if image is None else f"an image of {image.n_tokens}"
                raise InvalidInputError(
                    f"prompt {batch} has {len(positions)} more visual tokens after {len(grids)} images; expected {expected}: "
                    f"ids and images must come from one call of the processor, or {_HINT}"
                )
            grids.append(image.grid(positions[: image.n_tokens], batch))
            positions = positions[image.n_tokens :]
    if listed is not None and len(grids) < listed:
        raise InvalidInputError(f"got {listed} images and visual tokens for {len(grids)}; expected the ids of all of them")
    return grids


_Spans = Float[np.ndarray, "n 2"]  # where each row or column of a grid begins and ends, in pixels


@dataclass(frozen=True)
class _Image:
    """An image and its tokens, part after part, before they have positions in a prompt."""

    height: int
    width: int
    parts: list[pd.DataFrame]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.parts))

    def grid(self, positions: Int[np.ndarray, " tokens"], batch: int) -> PatchGrid:
        table = pd.concat(self.parts)
        edges = table[["x0", "y0", "x1", "y1"]].to_numpy(np.float64)
        boxes = np.clip(edges, 0, [self.width, self.height] * 2)  # a model may pad an image, and show the padding too
        rows, columns, levels = (table[name].to_numpy(np.int64) for name in ("row", "column", "level"))
        return PatchGrid(self.height, self.width, positions, boxes, rows, columns, levels, batch)


def _part(y: _Spans, x: _Spans, *, level: int = 0, newlines: bool = False, first: tuple[int, int] = (0, 0)) -> pd.DataFrame:
    """The tokens of rows × columns, row after row; with `newlines`, each row ends with one more that shows nothing."""
    if newlines:
        x = np.concatenate([x, [[np.nan, np.nan]]])
    row, column = (places.ravel() for places in np.indices((len(y), len(x))))
    boxes = {"x0": x[column, 0], "y0": y[row, 0], "x1": x[column, 1], "y1": y[row, 1]}
    table = pd.DataFrame({"level": level, "row": row + first[0], "column": column + first[1], **boxes})
    table.loc[table["x0"].isna(), ["y0", "y1"]] = np.nan
    return table


def _spans(edges: Float[np.ndarray, " n_and_end"]) -> _Spans:
    return np.stack([edges[:-1], edges[1:]], -1)


def _steps(n: int, step: float, tiles: int = 1, tile: float = 0) -> _Spans:
    """Spans of one length, n in each of some tiles: a convolution leaves out what is left at the end of a tile."""
    starts = (tile * np.arange(tiles)[:, None] + step * np.arange(n)).ravel()
    return np.stack([starts, starts + step], -1)


def _images(
    config: Any,
    fields: Mapping[str, Any],
    tiles: Sequence[tuple[int, int]] | None,
    shapes: Sequence[tuple[int, int]] | None,
    mask: Bool[np.ndarray, "batch pos"],
) -> tuple[Iterator[_Image], int | None]:
    """The images of a run, and how many there are; None where each prompt's number of tokens says it."""
    if shapes is not None:
        return (_Image(rows, columns, [_part(_steps(rows, 1), _steps(columns, 1))]) for rows, columns in shapes), len(shapes)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise InvalidInputError(f"got a model whose config does not describe an image encoder; {_HINT}")
    make: Callable[[Any], _Image]
    if hasattr(vision, "spatial_merge_size"):
        name, make = "image_grid_thw", partial(_merged, vision)
    elif hasattr(vision, "pooling_kernel_size"):
        name, make = "image_position_ids", partial(_pooled, vision)
    elif getattr(vision, "model_type", "") == "pixtral":
        name, make = "image_sizes", partial(_any_size, config)
    elif getattr(config, "image_grid_pinpoints", None):
        name, make = "image_sizes", partial(_any_resolution, config)
    else:
        return _fixed(config, vision, tiles, mask)
    if fields.get(name) is None:
        raise InvalidInputError(
            f"a {config.model_type} image has as many tokens as its {name} says, which is missing; give all that the processor "
            f"returned, patch_grids(model, inputs), or {_HINT}"
        )
    described = torch.as_tensor(fields[name]).cpu().numpy()
    described = described[None] if described.ndim == (2 if name == "image_position_ids" else 1) else described
    if getattr(config, "vision_aspect_ratio", None) and (per_prompt := fields.get("batch_num_images")) is not None:
        # LLaVA-OneVision looks at the details of an image only where it is alone in its prompt.
        alone = np.repeat(counts := torch.as_tensor(per_prompt).cpu().numpy(), counts) == 1
        pairs = zip(described, alone, strict=True)
        return (_any_resolution(config, size, details=bool(one)) for size, one in pairs), len(described)
    return map(make, described), len(described)


def _merged(vision: Any, thw: Int[np.ndarray, " 3"]) -> _Image:
    """Qwen-VL: patches of the whole image, merged in squares; its processor has brought the image to whole squares."""
    frames, rows, columns = map(int, thw)
    merge, patch = vision.spatial_merge_size, vision.patch_size
    if frames != 1:
        raise InvalidInputError(f"got image_grid_thw={thw.tolist()}; expected one frame: only images are supported, no videos")
    spans = (_steps(n // merge, merge * patch) for n in (rows, columns))
    return _Image(rows * patch, columns * patch, [_part(*spans)])


def _pooled(vision: Any, at: Int[np.ndarray, "patches 2"]) -> _Image:
    """Gemma 4: x and y of each patch, -1 where there is none, pooled in squares."""
    columns, rows = (at.max(0) + 1).tolist()
    pool, patch = vision.pooling_kernel_size, vision.patch_size
    spans = (_steps(n // pool, pool * patch) for n in (rows, columns))
    return _Image(rows * patch, columns * patch, [_part(*spans)])


def _any_size(config: Any, size: Int[np.ndarray, " 2"]) -> _Image:
    """Pixtral's encoder (Mistral 3): an image of any size, its patches merged in squares; what is left over is dropped."""
    height, width = map(int, size)
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return _Image(height, width, [_part(_steps(height // patch, patch), _steps(width // patch, patch))])


def _any_resolution(config: Any, size: Int[np.ndarray, " 2"], details: bool = True) -> _Image:
    """LLaVA-NeXT and LLaVA-OneVision: the whole image squeezed to one tile, then tiles of the image, padded, at the best size.

    Follows `pack_image_features` and `unpad_image` of transformers: rows or columns of padding are dropped, each row ends with
    a newline token, and OneVision (`vision_aspect_ratio`) shrinks grids beyond its maximum.
    """
    from transformers.image_processing_utils import select_best_resolution

    height, width = map(int, size)
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    n = tile // patch
    whole = _part(_steps(n, patch) * height / tile, _steps(n, patch) * width / tile)
    if not details:
        newline = pd.DataFrame({"level": 0, "row": n - 1, "column": n, **dict.fromkeys(("x0", "y0", "x1", "y1"), np.nan)}, [0])
        return _Image(height, width, [whole, newline])
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    scale = min(best[0] / height, best[1] / width)
    spans = []
    for length, room in zip((height, width), best, strict=True):
        resized = min(ceil(length * scale), room)  # as `get_patch_output_size`; the image is pasted in the middle
        cells = _steps(n, patch, room // tile, tile)
        shown = int(round(length * min(n * (b // tile) / s for b, s in zip(best, (height, width), strict=True)), 7))
        padding = (len(cells) - shown) // 2
        spans.append((cells[padding : len(cells) - padding] - (room - resized) // 2) * length / resized)
    if limit := getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_"):
        ratio = sqrt(len(spans[0]) * len(spans[1]) / (int(limit) * n**2))
        spans = [_shrunk(one, int(len(one) // ratio)) for one in spans] if ratio > 1.1 else spans
    return _Image(height, width, [whole, _part(spans[0], spans[1], level=1, newlines=True)])


def _shrunk(spans: _Spans, n: int) -> _Spans:
    edges = np.append(spans[:, 0], spans[-1, 1])
    return _spans(np.interp(np.linspace(0, len(spans), n + 1), np.arange(len(edges)), edges))


def _fixed(
    config: Any, vision: Any, tiles: Sequence[tuple[int, int]] | None, mask: Bool[np.ndarray, "batch pos"]
) -> tuple[Iterator[_Image], int | None]:
    """Models with the same square grid for every image (LLaVA, Gemma 3), or for every tile of one (Idefics3, Llama 4)."""
    size, patch = (np.ravel(getattr(vision, name, None) or [0])[0].item() for name in ("image_size", "patch_size"))
    n_tokens = getattr(config, "mm_tokens_per_image", None) or getattr(config, "vision_soft_tokens_per_image", None)
    smaller = next((value for name in _SMALLER for of in (config, vision) if (value := getattr(of, name, None))), None)
    if n_tokens:
        n = isqrt(n_tokens)
    elif size and patch:
        n = round(size // patch * (1 if smaller is None else smaller if smaller < 1 else 1 / smaller))
    else:
        raise InvalidInputError(f"the config of this {config.model_type} says nothing about its patches; {_HINT}")
    step = size // patch // n * patch if size and patch else 1
    size = size or n
    if smaller is None or n_tokens:
        endless = iter(lambda: _Image(size, size, [_part(_steps(n, step), _steps(n, step))]), None)
        return endless, None
    crops = mask.sum(-1) // n**2
    if tiles is None and (crops > 1).any():
        raise InvalidInputError(
            f"a prompt has {int(crops.max())} crops of {n} × {n} visual tokens; say how its images were cut, rows and columns "
            "of tiles of each: tiles=[(3, 4)], or (1, 1) for one left whole (the processor tells them as rows and cols)"
        )
    cut = [(1, 1)] * int(crops.sum()) if tiles is None else tiles
    return (_tiled(n, step, size, int(rows), int(columns)) for rows, columns in cut), len(cut)


def _tiled(n: int, step: float, tile: int, rows: int, columns: int) -> _Image:
    """Tiles of an image, row after row, and after them the whole image squeezed to one tile."""
    cells, height, width = _steps(n, step), tile * rows, tile * columns
    parts = [
        _part(cells + tile * i, cells + tile * j, level=1, first=(n * i, n * j))
        for i in range(rows)
        for j in range(columns)
        if rows * columns > 1
    ]
    return _Image(height, width, [*parts, _part(cells * rows, cells * columns)])
