"""Labelled SAE features as one self-contained HTML file: a table to search and sort, and a card for the feature chosen."""

import base64
import math
import zlib
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_latentlens.views.data import FeaturePage, ScoreAxis
from tl_latentlens.views.template import render_template
from tl_latentlens.views.text import printable, short_hook_name

TEXT_CUT, TEXT_END, TEXT_JOINED = 0, 1, 2
"""The first string numbers of a page: the text goes on, it ends, a token's text stands with the token before."""
UNKNOWN_SHADE = 255
"""The shade of a token whose activation is not known; 254 is the feature's largest."""


def feature_page(page: FeaturePage) -> str:
    """The page."""
    return render_template("features.html", _page_data(page), title="tl-latentlens: features")


def _page_data(page: FeaturePage) -> dict[str, Any]:
    """The data that the scripts of the page show."""
    table = page.table
    numbers = table.select_dtypes("number")
    score_names = [name for name in numbers if name != "feature" and not str(name).endswith("_null")]
    return {
        "about": page.about,
        "features": table["feature"].tolist(),
        "labels": list(map(printable, table["label"])),
        "why": list(map(printable, table["why_not"])),
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
