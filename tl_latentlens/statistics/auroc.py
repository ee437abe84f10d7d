"""The area under the ROC curve (AUROC), and its standard error."""

import numpy as np
from jaxtyping import Float
from scipy import stats


def auroc(
    positives: Float[np.ndarray, "n n_positives"], negatives: Float[np.ndarray, "n n_negatives"]
) -> Float[np.ndarray, " n"]:
    """The chance that a positive exceeds a negative, ties counted half, in [0, 1]; one figure a line.

    It is the Mann-Whitney U statistic over the number of pairs.
    """
    u = stats.mannwhitneyu(positives, negatives, alternative="greater", axis=1, method="asymptotic").statistic
    return np.asarray(u) / (positives.shape[1] * negatives.shape[1])


def auroc_standard_error(auroc: Float[np.ndarray, " n"], n_positives: int, n_negatives: int) -> Float[np.ndarray, " n"]:
    """Standard error of an AUROC (Hanley and McNeil 1982, equation 2)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)  # Named as in the paper.
    variance = auroc * (1 - auroc) + (n_positives - 1) * (q1 - auroc**2) + (n_negatives - 1) * (q2 - auroc**2)
    return np.sqrt(np.maximum(variance, 0) / (n_positives * n_negatives))
