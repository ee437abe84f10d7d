"""Rank sums against scipy, and how often anything holds where ranks are random."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from support.vectors import quick

from tl_latentlens.statistics.enrichment import least_rank_sum_p, rank_sum_p, tarone_levels


@quick
@given(n_all=st.integers(2, 40), data=st.data())
def test_rank_sums_are_those_of_the_exact_test(n_all: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, min(n_all - 1, 24)))
    ranks = np.sort(data.draw(st.permutations(range(1, n_all + 1)))[:n])
    others = np.setdiff1d(np.arange(1, n_all + 1), ranks)
    exact = mannwhitneyu(ranks, others, alternative="less", method="exact").pvalue
    [p] = rank_sum_p(np.array([ranks.sum()]), np.array([n]), np.array([n_all]))
    if n > 20:
        assert p == pytest.approx(exact, abs=0.03)
        return
    assert p == pytest.approx(exact, rel=1e-9)
    [least] = least_rank_sum_p(np.array([n]), np.array([n_all]))
    assert least <= p + 1e-12
    [of_first] = rank_sum_p(np.array([n * (n + 1) // 2]), np.array([n]), np.array([n_all]))
    assert of_first == pytest.approx(least, rel=1e-9)


@quick
@given(least=st.lists(st.floats(1e-9, 1), max_size=30), level=st.sampled_from([0.05, 0.2]))
def test_tests_that_cannot_hold_are_not_counted(least: list[float], level: float) -> None:
    n_counted = next(k for k in range(1, len(least) + 2) if sum(p <= level / k for p in least) <= k)
    families = np.repeat([0, 2], len(least))
    levels = tarone_levels(np.array(least * 2), families, 3, level)
    np.testing.assert_allclose(levels, [level / n_counted, level, level / n_counted])


def test_few_families_hold_where_ranks_are_random() -> None:
    rng = np.random.default_rng(0)
    n_families, n_uses, n_words = 2000, 40, 25
    n_with = rng.integers(2, 15, n_words)
    ranks = np.argsort(rng.random((n_families, n_uses)), axis=1) + 1
    has_word = np.argsort(rng.random((n_words, n_uses)), axis=1) < n_with[:, None]
    sums = ranks @ has_word.T
    p = rank_sum_p(sums.ravel(), np.tile(n_with, n_families), np.full(sums.size, n_uses)).reshape(sums.shape)
    level = tarone_levels(least_rank_sum_p(n_with, np.full(n_words, n_uses)), np.zeros(n_words, np.int64), 1, 0.05)
    share = (p <= level).any(1).mean()
    assert 0.01 < share < 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_families)
