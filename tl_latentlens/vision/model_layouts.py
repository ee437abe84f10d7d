"""Token layouts of the images of a run, as each family of vision-language models follows from its config and its processor.

What the model sees of each image depends on the family: one grid for all images, one that grows with the image, or tiles.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from math import ceil, isqrt, sqrt
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.vision.token_layout import (
    Spans,
    TokenLayout,
    equal_spans,
    newline_token,
    resample_spans,
    token_table,
)

GIVE_SHAPES = "give the grid by hand, shapes=[(rows, columns)]"
# These settings say how much smaller the grid becomes in Idefics3, Llama 4 and InternVL, which cut images into tiles.
_SHRINK_SETTINGS = ("scale_factor", "pixel_shuffle_ratio", "downsample_ratio")
_MIN_SHRINK_RATIO = 1.1  # LLaVA-OneVision keeps a grid that is larger than its maximum by less than this


@dataclass(frozen=True)
class ImageLayouts:
    """The token layouts of the images of a run, in the order of the images.

    Attributes:
        layouts: One for each image; without end where every image has the same.
        n_images: Number of images; None where only the number of tokens in each prompt says it.
    """

    layouts: Iterator[TokenLayout]
    n_images: int | None


def image_layouts(
    config: Any,
    fields: Mapping[str, Any],
    tiles: Sequence[tuple[int, int]] | None,
    shapes: Sequence[tuple[int, int]] | None,
    mask: Bool[np.ndarray, "batch pos"],
) -> ImageLayouts:
    """The layouts of a run's images.

    Args:
        config: The Hugging Face config of the model.
        fields: What the processor returned.
        tiles: Rows and columns of tiles of each image, for models that cut images into tiles.
        shapes: Rows and columns of each image's tokens; with them the config is not asked.
        mask: True at the visual tokens.

    Raises:
        InvalidInputError: Config and fields do not say what the grid depends on.
    """
    if shapes is not None:
        grids = (_one_grid(rows, columns, equal_spans(rows, 1), equal_spans(columns, 1)) for rows, columns in shapes)
        return ImageLayouts(grids, len(shapes))
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise InvalidInputError(f"got a model whose config does not describe an image encoder; {GIVE_SHAPES}")
    field_and_layout = _layout_by_field(config, vision)
    if field_and_layout is None:
        return _fixed_layouts(config, vision, tiles, mask)
    field, layout_of = field_and_layout
    if fields.get(field) is None:
        raise InvalidInputError(
            f"a {config.model_type} image has as many tokens as its {field} says, which is missing; give all that the "
            f"processor returned, patch_grids(model, inputs), or {GIVE_SHAPES}"
        )
    images = torch.as_tensor(fields[field]).cpu().numpy()
    images = images[None] if images.ndim == (2 if field == "image_position_ids" else 1) else images
    if getattr(config, "vision_aspect_ratio", None) and fields.get("batch_num_images") is not None:
        # LLaVA-OneVision looks at the details of an image only where it is alone in its prompt.
        n_in_prompt = torch.as_tensor(fields["batch_num_images"]).cpu().numpy()
        is_alone = np.repeat(n_in_prompt, n_in_prompt) == 1
        pairs = zip(images, is_alone, strict=True)
        return ImageLayouts((_llava_next(config, size, has_details=bool(alone)) for size, alone in pairs), len(images))
    return ImageLayouts(map(layout_of, images), len(images))


def _layout_by_field(config: Any, vision: Any) -> tuple[str, Callable[[Any], TokenLayout]] | None:
    """The processor's field that a family's layout depends on, and a function from it; None where all images have one grid."""
    if hasattr(vision, "spatial_merge_size"):
        return "image_grid_thw", partial(_qwen_vl, vision)
    if hasattr(vision, "pooling_kernel_size"):
        return "image_position_ids", partial(_gemma4, vision)
    if getattr(vision, "model_type", "") == "pixtral":
        return "image_sizes", partial(_pixtral, config)
    if getattr(config, "image_grid_pinpoints", None):
        return "image_sizes", partial(_llava_next, config)
    return None


def _one_grid(height: int, width: int, row_spans: Spans, column_spans: Spans) -> TokenLayout:
    return TokenLayout(height, width, token_table(row_spans, column_spans))


def _qwen_vl(vision: Any, thw: Int[np.ndarray, " 3"]) -> TokenLayout:
    """Qwen-VL: patches of the whole image, merged in squares. Its processor has resized the image to whole squares."""
    n_frames, rows, columns = map(int, thw)
    merge, patch = vision.spatial_merge_size, vision.patch_size
    if n_frames != 1:
        raise InvalidInputError(f"got image_grid_thw={thw.tolist()}; expected one frame: only images are supported, no videos")
    spans = (equal_spans(n // merge, merge * patch) for n in (rows, columns))
    return _one_grid(rows * patch, columns * patch, *spans)


def _gemma4(vision: Any, patch_ids: Int[np.ndarray, "patches 2"]) -> TokenLayout:
    """Gemma 4: column and row of each patch, -1 where there is none, pooled in squares."""
    columns, rows = (patch_ids.max(0) + 1).tolist()
    pool, patch = vision.pooling_kernel_size, vision.patch_size
    spans = (equal_spans(n // pool, pool * patch) for n in (rows, columns))
    return _one_grid(rows * patch, columns * patch, *spans)


def _pixtral(config: Any, size: Int[np.ndarray, " 2"]) -> TokenLayout:
    """Pixtral's encoder (Mistral 3): an image of any size, its patches merged in squares; an incomplete square is dropped."""
    height, width = map(int, size)
    patch = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return _one_grid(height, width, equal_spans(height // patch, patch), equal_spans(width // patch, patch))


def _llava_next(config: Any, size: Int[np.ndarray, " 2"], has_details: bool = True) -> TokenLayout:
    """LLaVA-NeXT and LLaVA-OneVision: the whole image squeezed to one tile, then tiles of the image, padded, at the best size.

    Follows `pack_image_features` and `unpad_image` of transformers: rows or columns of padding are dropped, and each row ends
    with a newline token.
    """
    height, width = map(int, size)
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    n = tile // patch
    whole = token_table(equal_spans(n, patch) * height / tile, equal_spans(n, patch) * width / tile)
    if not has_details:
        return TokenLayout(height, width, pd.concat([whole, newline_token(n - 1, n)]))
    row_spans, column_spans = _shrink_to_limit(config, _unpadded_spans(config, (height, width)), n)
    details = token_table(row_spans, column_spans, level=1, newlines=True)
    return TokenLayout(height, width, pd.concat([whole, details]))


def _unpadded_spans(config: Any, size: tuple[int, int]) -> list[Spans]:
    """Rows and columns of LLaVA-NeXT's tiles that show some of the image, in pixels of the image."""
    from transformers.image_processing_utils import select_best_resolution

    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    n = tile // patch
    best_size = select_best_resolution(size, config.image_grid_pinpoints)
    scale = min(best_size[0] / size[0], best_size[1] / size[1])
    spans = []
    for length, best_length in zip(size, best_size, strict=True):
        # `get_patch_output_size` computes the same. The image is pasted in the middle.
        resized = min(ceil(length * scale), best_length)
        cells = equal_spans(n, patch, best_length // tile, tile)
        cells_per_pixel = min(n * (best // tile) / original for best, original in zip(best_size, size, strict=True))
        n_shown = int(round(length * cells_per_pixel, 7))
        padding = (len(cells) - n_shown) // 2
        spans.append((cells[padding : len(cells) - padding] - (best_length - resized) // 2) * length / resized)
    return spans


def _shrink_to_limit(config: Any, spans: list[Spans], n: int) -> list[Spans]:
    """Fewer rows and columns where LLaVA-OneVision's `vision_aspect_ratio` ("anyres_max_9") sets a maximum for them."""
    limit = getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_")
    if not limit:
        return spans
    ratio = sqrt(len(spans[0]) * len(spans[1]) / (int(limit) * n**2))
    return [resample_spans(axis, int(len(axis) // ratio)) for axis in spans] if ratio > _MIN_SHRINK_RATIO else spans


def _fixed_layouts(
    config: Any, vision: Any, tiles: Sequence[tuple[int, int]] | None, mask: Bool[np.ndarray, "batch pos"]
) -> ImageLayouts:
    """Models with the same square grid for every image (LLaVA, Gemma 3), or for every tile of one (Idefics3, Llama 4)."""
    size, patch = (np.ravel(getattr(vision, name, None) or [0])[0].item() for name in ("image_size", "patch_size"))
    n_tokens = getattr(config, "mm_tokens_per_image", None) or getattr(config, "vision_soft_tokens_per_image", None)
    shrink = _shrink_setting(config, vision)
    if n_tokens:
        n = isqrt(n_tokens)
    elif size and patch:
        n = round(size // patch * (1 if shrink is None else shrink if shrink < 1 else 1 / shrink))
    else:
        raise InvalidInputError(f"the config of this {config.model_type} says nothing about its patches; {GIVE_SHAPES}")
    step = size // patch // n * patch if size and patch else 1
    size = size or n
    if shrink is None or n_tokens:
        return ImageLayouts(repeat(_one_grid(size, size, equal_spans(n, step), equal_spans(n, step))), None)
    n_crops = mask.sum(-1) // n**2
    if tiles is None and (n_crops > 1).any():
        raise InvalidInputError(
            f"a prompt has {int(n_crops.max())} crops of {n} × {n} visual tokens; say how its images were cut, rows and "
            "columns of tiles of each: tiles=[(3, 4)], or (1, 1) for one left whole (the processor tells them as rows and cols)"
        )
    tiles = [(1, 1)] * int(n_crops.sum()) if tiles is None else tiles
    return ImageLayouts((_tiled(n, step, size, int(rows), int(columns)) for rows, columns in tiles), len(tiles))


def _shrink_setting(config: Any, vision: Any) -> float | None:
    """The factor between the grid of patches and the smaller one of tokens, from one of several settings; None: none is set."""
    settings = (getattr(part, name, None) for name in _SHRINK_SETTINGS for part in (config, vision))
    return next((value for value in settings if value), None)


def _tiled(n: int, step: float, tile: int, rows: int, columns: int) -> TokenLayout:
    """Tiles of an image, row after row, and after them the whole image squeezed to one tile."""
    cells, height, width = equal_spans(n, step), tile * rows, tile * columns
    tables = [
        token_table(cells + tile * i, cells + tile * j, level=1, first_row=n * i, first_column=n * j)
        for i in range(rows)
        for j in range(columns)
        if rows * columns > 1
    ]
    return TokenLayout(height, width, pd.concat([*tables, token_table(cells * rows, cells * columns)]))
