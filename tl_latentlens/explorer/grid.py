"""What the browser draws: for each layer and token, or patch of an image, the word that a lens reads first and its score."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_latentlens.explorer.reader import ImageReading, PromptReading
from tl_latentlens.views.sheet import LENSES, Sheet, contexts_of, sheet_of, span
from tl_latentlens.views.text import hook_headings
from tl_latentlens.vision.image_page import patch_data, read_patches

_AROUND = 60  # characters of context that complete a cell's token
_KEYS = {label: lens for lens, label in LENSES.items()}


def prompt_grid(read: PromptReading, lens: str, hook_names: Sequence[str]) -> dict[str, Any]:
    """A table: a column a token, a row a hook name, the last layer on top; each cell a token and a score."""
    return _grid(sheet_of(read.result, 0), lens, hook_names)


def image_grid(read: ImageReading, name: str, lens: str, hook_names: Sequence[str]) -> dict[str, Any]:
    """The same of the patches of an image, and where they are on it; `name` is the picture's, which comes apart."""
    grid, sheet, tokens = read_patches(read.result, read.seen.grid, read.seen.picture)
    return {**_grid(sheet, lens, hook_names), "image": {"name": name, **patch_data(grid, tokens)}}


def _grid(sheet: Sheet, lens: str, hook_names: Sequence[str]) -> dict[str, Any]:
    shown = [i for i, name in enumerate(sheet.hook_names) if name in hook_names]
    values, words = _first(sheet, _KEYS[lens])
    low, high = span([values[shown]], "probability" if lens == "logit lens" else "cosine")
    labels, kind = hook_headings([sheet.hook_names[i] for i in shown])
    rows = [
        {
            "hook": sheet.hook_names[i],
            "label": label,
            "cells": [
                [*word, round(score, 4)] if np.isfinite(score) else None
                for word, score in zip(words[i], values[i].tolist(), strict=True)
            ],
        }
        for i, label in zip(shown, labels, strict=True)
    ]
    columns = [{"pos": pos, "token": token} for pos, token in zip(sheet.positions, sheet.tokens, strict=True)]
    unit = "probability" if lens == "logit lens" else "similarity"
    return {"columns": columns, "rows": rows[::-1], "kind": kind, "low": low, "high": high, "unit": unit}


def _first(sheet: Sheet, lens: str) -> tuple[np.ndarray, list[list[tuple[str, str, str]]]]:
    """Of each cell the best score, NaN where the lens does not read, and its token with what completes it to a word."""
    if lens not in sheet.lenses:
        missing = np.full((len(sheet.hook_names), len(sheet.positions)), np.nan)
        return missing, [[("", "", "")] * len(sheet.positions)] * len(sheet.hook_names)
    if lens != "latentlens":
        return sheet.values(lens), [[("", token, "") for token in tokens] for tokens in sheet.best(lens)]
    rows = sheet.rows[..., 0].tolist()
    contexts = contexts_of(sheet.index, {row for line in rows for row in line}, _AROUND)
    words = [[(found.lead, found.token, found.tail) for found in map(contexts.__getitem__, line)] for line in rows]
    return sheet.values(lens), words
