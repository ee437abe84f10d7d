"""What the browser draws of a prompt: layers × tokens, each with the word that a lens reads first and its score."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_latentlens.views.explore_reader import PromptReading
from tl_latentlens.views.sheet import LENSES, Sheet, contexts_of, sheet_of, span
from tl_latentlens.views.text import hook_headings

_AROUND = 60  # characters of context that complete a cell's token
_KEYS = {label: lens for lens, label in LENSES.items()}


def prompt_grid(read: PromptReading, lens: str, hook_names: Sequence[str]) -> dict[str, Any]:
    """What the browser draws: a column a token, a row a hook name, the last layer on top; each cell a token and a score."""
    sheet = sheet_of(read.result, 0)
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
