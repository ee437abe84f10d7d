"""P-values against the scores of a null."""

import numpy as np
from jaxtyping import Float


def p_values(values: Float[np.ndarray, " n"], null: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
    """The p-value of each value, in (0, 1]: (1 + number of null scores at least as large) / (1 + number of null scores)."""
    ordered = np.sort(null)
    n_at_least = len(ordered) - np.searchsorted(ordered, values, "left")
    return (1 + n_at_least) / (1 + len(ordered))
