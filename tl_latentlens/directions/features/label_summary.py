"""Means of the scores over the features of a table."""

import math

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from tl_latentlens.statistics.intervals import share_of

SIGNIFICANCE_LEVEL = 0.01
_NAMED = ("token", "before", "after", "position")
_NULL_NAMES = {"similarity": "random directions", "auroc": "shuffled", "auroc_same_token": "shuffled"}
_SCORES = ("auroc", "auroc_same_token", "overlap", "steered", "steered_next", "steered_words", "steered_logit_tokens")
CHANCE = {"intruder": 0.2, "embedding": 0.5}
"""What scores are where a feature says nothing."""
_DETECTION = {"detection": "detection of labels", "detection_top": "detection of labels, top ten contexts"}


def is_labelled(table: pd.DataFrame) -> Bool[np.ndarray, " f"]:
    """True for features that have a label which names something: not for mixed ones."""
    return table["label_kind"].isin(_NAMED).to_numpy()


def label_places(table: pd.DataFrame) -> Int[np.ndarray, " f"]:
    """Where a feature stands in a list: 0 with a label that names something, 1 with a mixed one, 2 without."""
    return np.where(is_labelled(table), 0, np.where(table["label_kind"] == "", 2, 1))


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """One line a figure: its mean over living features, its 95 % Wilson interval, its null, and the number of features.

    The figures are the share of labelled features, the share that beats each null, and the mean of each score, all in [0, 1].
    """
    table = table.dropna(subset="similarity")  # The similarity of a zero decoder row is NaN.
    is_alive = table["density"].to_numpy() > 0 if "density" in table else np.ones(len(table), bool)
    columns = {str(name): table[name].to_numpy()[is_alive] for name in table}
    lines = [_line("labelled", is_labelled(table)[is_alive], math.nan)]
    lines += [_line("mixed", columns["label_kind"] == "mixed", math.nan)]
    for score, figure in _DETECTION.items():
        if score in columns:
            lines.append(_line(figure, columns[score], _mean_of_known(columns["detection_null"])))
    lines += [_line(score, columns[score], chance) for score, chance in CHANCE.items() if score in columns]
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


def _line(figure: str, values: Float[np.ndarray, " f"] | Bool[np.ndarray, " f"], null: float) -> dict[str, str | float]:
    mean = share_of(values)
    return {"figure": figure, "mean": mean.mean, "low": mean.low, "high": mean.high, "null": null, "features": mean.n}
