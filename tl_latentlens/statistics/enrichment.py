"""Which things stand among the first of a ranking more than chance puts them there, for many things at once."""

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import comb, ndtr

_MAX_EXACT = 20  # Of more ranks than this the sum is nearly normal.


def rank_sum_p(
    rank_sums: Int[np.ndarray, " n"], n_ranks: Int[np.ndarray, " n"], n_all: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The chance that random ranks have a sum at most as large: the one-sided test of Wilcoxon (1945), without ties.

    It is exact for up to 20 ranks, and normal with a correction for continuity for more.

    Args:
        rank_sums: Sums of ranks, which count from 1.
        n_ranks: How many ranks each sum is of.
        n_all: The number of all ranks that they are drawn from.
    """
    mean, variance = n_ranks * (n_all + 1) / 2, n_ranks * (n_all - n_ranks) * (n_all + 1) / 12
    p = np.where(variance > 0, ndtr((rank_sums + 0.5 - mean) / np.sqrt(np.maximum(variance, 1e-9))), 1.0)
    is_exact = n_ranks <= _MAX_EXACT
    for n in np.unique(n_all[is_exact]).tolist():
        of_n = np.flatnonzero(is_exact & (n_all == n))
        p[of_n] = _rank_sum_shares(n)[n_ranks[of_n], rank_sums[of_n]]
    return p


def least_rank_sum_p(n_ranks: Int[np.ndarray, " n"], n_all: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The smallest chance that `rank_sum_p` can give: that all ranks are the first ones."""
    return np.reciprocal(comb(n_all, n_ranks))


@lru_cache(256)
def _rank_sum_shares(n_all: int) -> Float[np.ndarray, "counts sums"]:
    """For each number of ranks out of `n_all`, the share of choices whose sum is at most each number."""
    counts = np.zeros((_MAX_EXACT + 1, _MAX_EXACT * n_all + 1))
    counts[0, 0] = 1
    for rank in range(1, n_all + 1):
        counts[1:, rank:] += counts[:-1, : counts.shape[1] - rank].copy()
    return counts.cumsum(1) / np.maximum(counts.sum(1, keepdims=True), 1)


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
