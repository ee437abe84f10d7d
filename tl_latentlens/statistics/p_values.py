"""P-values against the scores of a null."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def p_values(values: Float[np.ndarray, " n"], null: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
    """The p-value of each value, in (0, 1]: (1 + number of null scores at least as large) / (1 + number of null scores)."""
    ordered = np.sort(null)
    n_at_least = len(ordered) - np.searchsorted(ordered, values, "left")
    return (1 + n_at_least) / (1 + len(ordered))


def p_values_by_bin(
    values: Float[np.ndarray, " n"], bins: Int[np.ndarray, " n"], nulls: Sequence[Float[np.ndarray, " _"]]
) -> Float[np.ndarray, " n"]:
    """The p-value of each value against the null of its own bin.

    Args:
        values: The values.
        bins: The bin of each.
        nulls: The null scores of each bin.
    """
    found = np.ones(len(values))
    for place, null in enumerate(nulls):
        found[bins == place] = p_values(values[bins == place], null)
    return found
