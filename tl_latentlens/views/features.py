"""Labelled SAE features as one self-contained HTML file: a table to search and sort, and a card for the feature chosen."""

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_latentlens.views.label_kinds import FIRES, MIXED, part_name
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.template import render_template
from tl_latentlens.views.text import printable, short_hook_name

TEXT_CUT, TEXT_END, TEXT_JOINED = 0, 1, 2
"""The first string numbers of a page: the text goes on, it ends, a token's text stands with the token before."""
UNKNOWN_SHADE = 255
"""The shade of a token whose activation is not known; 254 is the feature's largest."""


@dataclass(frozen=True)
class ScoreAxis:
    """A score of features on the axis on which a page draws it.

    Attributes:
        name: Its column of the feature table.
        heading: What it is called.
        p_name: The column of its p-values, whether or not the table has one.
        low, high: The ends of the axis.
        null_means: The mean score of wrong directions: one for all features, or one for each density bin; empty where there is
            none.
        null_counts: How many wrong directions stand in each bin of the axis, for the same; empty where they are not known.
        is_chance: The mean is what chance gives, and was not measured.
    """

    name: str
    heading: str
    p_name: str
    low: float
    high: float
    null_means: list[float]
    null_counts: list[list[int]]
    is_chance: bool = False


@dataclass(frozen=True, eq=False)
class FeaturePage:
    """The data of the page of labelled features.

    Attributes:
        head: What the page opens with.
        table: A line a feature: feature, label, its kind, parts and words near, why_not, words of both ends, and scores; and
            `sentence`, where a language model wrote some.
        array_rows: For each line of the table its row in `arrays`; -1 where its decoder row is zero.
        hook_names: The hook names that were searched.
        score_axes: The scores that are drawn.
        density_bins: For each line of the table, which of a score's nulls it is held against, where they differ by density.
        histogram_edges: The edges between the bins of the histograms of activations.
        n_before, n_after: Tokens that are shown around a row.
        strings: The texts that `arrays` number.
        arrays: "tokens", the texts around all rows as one stream of string numbers; and arrays of a line a feature: places in
            that stream ("positive", "negative", "top"), their cosines times 10,000, hook names and activations, histograms,
            shades, and tokens of the logit lens with their logits.
    """

    head: PageHead
    table: pd.DataFrame
    array_rows: list[int]
    hook_names: Sequence[str]
    score_axes: list[ScoreAxis]
    density_bins: list[int]
    histogram_edges: list[float]
    n_before: int
    n_after: int
    strings: list[str]
    arrays: dict[str, np.ndarray]


def feature_page(page: FeaturePage) -> str:
    """The page."""
    return render_template("features.html", _page_data(page), page.head, title="tl-latentlens: features")


def _page_data(page: FeaturePage) -> dict[str, Any]:
    """The data that the scripts of the page show."""
    table = page.table
    numbers = table.select_dtypes("number")
    score_names = [name for name in numbers if name != "feature" and not str(name).endswith("_null")]
    return {
        "features": table["feature"].tolist(),
        "labels": list(map(printable, table["label"])),
        "kinds": list(map(str, table["label_kind"])),
        "says": {MIXED: "mixed of", **(FIRES if "density" in table else dict.fromkeys(FIRES, "its nearest rows"))},
        "parts": [[[printable(part_name(text)), round(share, 4)] for text, share in parts] for parts in table["label_parts"]],
        "near": [list(map(printable, words)) for words in table["label_near"]],
        "why": list(map(printable, table["why_not"])),
        "label_negative": list(map(printable, table["label_negative"])),
        **{name: [printable(", ".join(words)) for words in table[name]] for name in ("words", "words_negative")},
        "sentences": list(map(printable, table["sentence"])) if "sentence" in table else [],
        "figures": {name: _four_digits(table[name].to_numpy(float)) for name in score_names},
        "scores": list(map(_axis_data, page.score_axes)),
        "bins": page.density_bins,
        "found": page.array_rows,
        "hooks": list(map(short_hook_name, page.hook_names)),
        "edges": page.histogram_edges,
        "window": [page.n_before, page.n_after],
        "unknown": UNKNOWN_SHADE,
        "strings": page.strings,
        "arrays": {name: _packed(array) for name, array in page.arrays.items()},
    }


def _axis_data(axis: ScoreAxis) -> dict[str, Any]:
    return {
        "name": axis.name,
        "heading": axis.heading,
        "p": axis.p_name,
        "beside": "chance" if axis.is_chance else "null",
        "low": axis.low,
        "high": axis.high,
        "nulls": _four_digits(np.array(axis.null_means, float)),
        "counts": axis.null_counts,
    }


def _four_digits(values: Float[np.ndarray, " n"]) -> list[float | None]:
    """Four significant digits; None for NaN and inf, which JSON does not have."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def _packed(array: np.ndarray) -> dict[str, Any]:
    """An array as deflated base64: whole numbers as the smallest type that holds them, others as float32."""
    if array.dtype.kind == "f":
        dtype = np.dtype("<f4")
    else:
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        dtype = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high)).newbyteorder("<")
    content = base64.b64encode(zlib.compress(np.ascontiguousarray(array, dtype).tobytes(), 6)).decode()
    return {"type": f"{dtype.name.capitalize()}Array", "shape": list(array.shape), "data": content}
