"""The area under the ROC curve (AUROC), and its 95 % interval."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

_NORMAL_975 = 1.96
_N_HALVINGS = 40


class Interval(NamedTuple):
    """The ends of an interval."""

    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]


def auroc(
    positives: Float[np.ndarray, "n n_positives"], negatives: Float[np.ndarray, "n n_negatives"]
) -> Float[np.ndarray, " n"]:
    """The chance that a positive exceeds a negative, ties counted half, in [0, 1]; one figure a line.

    It is the Mann-Whitney U statistic over the number of pairs.
    """
    u = stats.mannwhitneyu(positives, negatives, alternative="greater", axis=1, method="asymptotic").statistic
    return np.asarray(u) / (positives.shape[1] * negatives.shape[1])


def auroc_interval(auroc: Float[np.ndarray, " n"], n_positives: int, n_negatives: int) -> Interval:
    """The 95 % interval of each AUROC: the true values from which it is at most 1.96 standard errors away.

    The standard error is taken at the true value, not at the one that was found. So the interval has a width even where all
    positives exceed all negatives: 0.84 to 1 for ten positives among fifty negatives.
    """
    low = _lower_bound(auroc, n_positives, n_negatives)
    # The chance that a negative exceeds a positive is 1 - AUROC, so its lower bound gives the upper one.
    return Interval(low, 1 - _lower_bound(1 - auroc, n_negatives, n_positives))


def auroc_standard_error(auroc: Float[np.ndarray, " n"], n_positives: int, n_negatives: int) -> Float[np.ndarray, " n"]:
    """Standard error of an AUROC (Hanley and McNeil 1982, equation 2)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)  # Named as in the paper.
    variance = auroc * (1 - auroc) + (n_positives - 1) * (q1 - auroc**2) + (n_negatives - 1) * (q2 - auroc**2)
    return np.sqrt(np.maximum(variance, 0) / (n_positives * n_negatives))


def _lower_bound(auroc: Float[np.ndarray, " n"], n_positives: int, n_negatives: int) -> Float[np.ndarray, " n"]:
    """The least true value that is at most 1.96 standard errors below the found one, by bisection."""
    low, high = np.zeros_like(auroc), np.array(auroc)
    for _ in range(_N_HALVINGS):
        middle = (low + high) / 2
        is_below = middle + _NORMAL_975 * auroc_standard_error(middle, n_positives, n_negatives) < auroc
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return high
