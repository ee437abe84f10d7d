"""Means of the scores over the features of a table."""

import math

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_latentlens.statistics.intervals import mean_of

SIGNIFICANCE_LEVEL = 0.01
_NULL_NAMES = {"similarity": "random directions", "auroc": "shuffled", "auroc_same_token": "shuffled"}
_SCORES = ("auroc", "auroc_same_token", "overlap", "steered", "steered_next")


def summarize(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One line a figure: its mean over living features, its 95 % bootstrap interval, its null, and the number of features.

    The figures are the share of labelled features, the share that beats each null, and the mean of each score.
    """
    table = table.dropna(subset="similarity")  # The similarity of a zero decoder row is NaN.
    is_alive = table["density"].to_numpy() > 0 if "density" in table else np.ones(len(table), bool)
    columns = {str(name): table[name].to_numpy()[is_alive] for name in table}
    lines = [_line("labelled", columns["label"] != "", math.nan, seed)]
    for score, null in _NULL_NAMES.items():
        if f"p_{score}" in columns:
            beats_null = columns[f"p_{score}"] < SIGNIFICANCE_LEVEL
            lines.append(_line(f"{score} beats {null}, p < {SIGNIFICANCE_LEVEL}", beats_null, SIGNIFICANCE_LEVEL, seed))
    for score in _SCORES:
        if score in columns:
            null_mean = next(iter(table[f"{score}_null"].tolist()), math.nan)
            lines.append(_line(score, columns[score], null_mean, seed))
    return pd.DataFrame(lines)


def _line(figure: str, values: Float[np.ndarray, " f"], null: float, seed: int) -> dict[str, str | float]:
    mean = mean_of(values, seed)
    return {"figure": figure, "mean": mean.mean, "low": mean.low, "high": mean.high, "null": null, "features": mean.n}
