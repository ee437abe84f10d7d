"""Which things stand more often in some draws than chance puts them there: Fisher's exact test, for many things at once."""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom


def enrichment_p(
    n_drawn_with: Int[np.ndarray, " n"],
    n_drawn: Int[np.ndarray, " n"],
    n_with: Int[np.ndarray, " n"],
    n_all: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """The chance that draws without replacement hold a thing at least so often: the one-sided exact test of Fisher.

    Args:
        n_drawn_with: Draws that hold the thing.
        n_drawn: Draws.
        n_with: Of all, those that hold it.
        n_all: All that are drawn from.
    """
    return hypergeom.sf(n_drawn_with - 1, n_all, n_with, n_drawn)


def tarone_levels(
    least_p: Float[np.ndarray, " n"], families: Int[np.ndarray, " n"], n_families: int, level: float
) -> Float[np.ndarray, " families"]:
    """For each family of tests the p up to which a test of it holds, so that with `level` at most any holds by chance.

    A test that could not reach that p however it came out is not counted among them (Tarone 1990).

    Args:
        least_p: The smallest p that each test can have.
        families: The family of each test.
        n_families: Number of families.
        level: The chance that one test or more of a family holds where none should.
    """
    order = np.lexsort((least_p, families))
    families, least_p = families[order], least_p[order]
    n_tests = np.bincount(families, minlength=n_families)
    place = np.arange(len(order)) - np.repeat(np.cumsum(n_tests) - n_tests, n_tests)  # counted from 0 in each family
    # Of k tests that count, the next has a least p above level / k.
    is_enough: Bool[np.ndarray, " n"] = (place >= 1) & (least_p > level / np.maximum(place, 1))
    n_counted = np.maximum(n_tests, 1)
    np.minimum.at(n_counted, families[is_enough], place[is_enough])
    return level / n_counted
