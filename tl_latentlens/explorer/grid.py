"""The grid that the browser draws: for each layer and token, or image patch, the first word of a lens and its score."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_latentlens.explorer.reader import ImageReading, PromptReading
from tl_latentlens.views.colors import color_range
from tl_latentlens.views.grids import LensGrid
from tl_latentlens.views.image import patch_data
from tl_latentlens.views.lens_names import CONTEXT_LENSES, LENSES, NO_WORD
from tl_latentlens.views.text import hook_headings
from tl_latentlens.vision.image_page import image_grid as read_image_grid

_AROUND = 60  # characters of context that complete a cell's token
_KEYS = {info.label: lens for lens, info in LENSES.items()}


def prompt_grid(read: PromptReading, lens: str, hook_names: Sequence[str]) -> dict[str, Any]:
    """A table: a column a token, a row a hook name, last layer on top; each cell a token, a score, and whether it is faint."""
    return _grid(read.result.grid(0), lens, hook_names)


def image_grid(read: ImageReading, name: str, lens: str, hook_names: Sequence[str]) -> dict[str, Any]:
    """The same of the patches of an image, and where they are on it; `name` is the picture's, which comes apart."""
    image = read_image_grid(read.result, read.image.grid, read.image.picture)
    return {**_grid(image.grid, lens, hook_names), "image": {"name": name, **patch_data(image)}}


def _grid(grid: LensGrid, lens: str, hook_names: Sequence[str]) -> dict[str, Any]:
    shown = [i for i, name in enumerate(grid.hook_names) if name in hook_names]
    values, words = _first(grid, _KEYS[lens])
    has_none = np.array([[token == NO_WORD for _, token, _ in line] for line in words]) & (_KEYS[lens] != "latentlens")
    faint = (grid.is_unknown | has_none) & (_KEYS[lens] in CONTEXT_LENSES)
    unit = grid.score_name(_KEYS[lens])
    low, high = color_range([values[shown]], unit)
    labels, kind = hook_headings([grid.hook_names[i] for i in shown])
    rows = [
        {
            "hook": grid.hook_names[i],
            "label": label,
            "cells": [
                [*word, round(score, 4), is_faint] if np.isfinite(score) else None
                for word, score, is_faint in zip(words[i], values[i].tolist(), faint[i].tolist(), strict=True)
            ],
        }
        for i, label in zip(shown, labels, strict=True)
    ]
    columns = [{"pos": pos, "token": token} for pos, token in zip(grid.positions, grid.tokens, strict=True)]
    return {"columns": columns, "rows": rows[::-1], "kind": kind, "low": low, "high": high, "unit": unit, "lens": _KEYS[lens]}


def _first(grid: LensGrid, lens: str) -> tuple[np.ndarray, list[list[tuple[str, str, str]]]]:
    """Of each cell the best score, NaN where the lens does not read, and its token with what completes it to a word."""
    if lens not in grid.lenses:
        missing = np.full((len(grid.hook_names), len(grid.positions)), np.nan)
        return missing, [[("", "", "")] * len(grid.positions)] * len(grid.hook_names)
    if lens != "latentlens":
        return grid.values(lens), [[("", token, "") for token in tokens] for tokens in grid.first_tokens(lens)]
    rows = grid.rows[..., 0].tolist()
    contexts = grid.contexts({row for line in rows for row in line}, _AROUND)
    words = [[(found.lead, found.token, found.tail) for found in map(contexts.__getitem__, line)] for line in rows]
    return grid.values(lens), words
