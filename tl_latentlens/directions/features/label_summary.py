"""Means of the scores over the features of a table."""

import math

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_latentlens.statistics.intervals import share_of

SIGNIFICANCE_LEVEL = 0.01
_NULL_NAMES = {"similarity": "random directions", "auroc": "shuffled", "auroc_same_token": "shuffled"}
_SCORES = ("auroc", "auroc_same_token", "overlap", "steered", "steered_next")


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """One line a figure: its mean over living features, its 95 % Wilson interval, its null, and the number of features.

    The figures are the share of labelled features, the share that beats each null, and the mean of each score, all in [0, 1].
    """
    table = table.dropna(subset="similarity")  # The similarity of a zero decoder row is NaN.
    is_alive = table["density"].to_numpy() > 0 if "density" in table else np.ones(len(table), bool)
    columns = {str(name): table[name].to_numpy()[is_alive] for name in table}
    lines = [_line("labelled", columns["label"] != "", math.nan)]
    for score, null in _NULL_NAMES.items():
        if f"p_{score}" in columns:
            beats_null = columns[f"p_{score}"] < SIGNIFICANCE_LEVEL
            lines.append(_line(f"{score} beats {null}, p < {SIGNIFICANCE_LEVEL}", beats_null, SIGNIFICANCE_LEVEL))
    for score in _SCORES:
        if score in columns:
            lines.append(_line(score, columns[score], _mean_of_known(columns[f"{score}_null"])))
    return pd.DataFrame(lines)


def _mean_of_known(values: Float[np.ndarray, " f"]) -> float:
    """The mean of the values that are not NaN; NaN where there are none."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else math.nan


def _line(figure: str, values: Float[np.ndarray, " f"], null: float) -> dict[str, str | float]:
    mean = share_of(values)
    return {"figure": figure, "mean": mean.mean, "low": mean.low, "high": mean.high, "null": null, "features": mean.n}
