"""Intervals hold the truth as often as they say, of shares, of amounts over powers of ten, and of few values."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from tl_latentlens.statistics.intervals import Mean, gain_of, geometric_mean_of, mean_of, share_of

DRAWS = 1500  # cases of a simulation: their coverage has a standard error of 0.006


def coverage(interval: Callable[[np.ndarray], Mean], drawn: np.ndarray, truth: float) -> float:
    """How often the interval of a line of `drawn` holds the truth, of those that have one."""
    found = [interval(line) for line in drawn]
    return float(np.mean([one.low <= truth <= one.high for one in found if not math.isnan(one.low)]))


@pytest.mark.parametrize("n", [30, 137])
@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.97])
def test_shares_of_units_that_are_right_or_wrong(share: float, n: int) -> None:
    drawn = (np.random.default_rng(n).random((DRAWS, n)) < share).astype(float)
    assert 0.92 < coverage(share_of, drawn, share) < 0.985
    found = share_of(drawn[0])
    wilson = stats.binomtest(int(drawn[0].sum()), n).proportion_ci(method="wilson")
    np.testing.assert_allclose((found.low, found.high), (wilson.low, wilson.high))


@pytest.mark.parametrize("n", [30, 137])
@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("alike", [0.1, 0.5, 0.9])
def test_shares_of_several_trials_are_not_too_wide(share: float, alike: float, n: int) -> None:
    rng, spread = np.random.default_rng(n), 1 / alike - 1
    drawn = rng.binomial(5, rng.beta(share * spread, (1 - share) * spread, (DRAWS, n))) / 5
    assert 0.92 < coverage(share_of, drawn, share) < 0.99


@pytest.mark.parametrize("n", [30, 137])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_geometric_means_of_amounts_over_powers_of_ten(sigma: float, n: int) -> None:
    """Skewed to the left in the logarithm, as KL divergences are; the mean itself would be covered in half of the cases."""
    rng = np.random.default_rng(n)
    drawn, many = (np.exp(-sigma * rng.gamma(2, 1, shape)) for shape in ((DRAWS, n), 10**6))
    assert 0.915 < coverage(geometric_mean_of, drawn, geometric_mean_of(many).mean) < 0.98


@pytest.mark.parametrize(("zeros", "n"), [(0.2, 30), (0.8, 30), (0.2, 300), (0.95, 300)])
def test_gains_of_units_that_mostly_agree(zeros: float, n: int) -> None:
    rng = np.random.default_rng(n)
    drawn = np.where(rng.random((DRAWS, n)) < zeros, 0, rng.normal(0.02, 0.1, (DRAWS, n)))
    assert 0.92 < coverage(gain_of, drawn, 0.02 * (1 - zeros)) < 0.985


def test_means_of_values_that_are_not_skewed() -> None:
    drawn = np.random.default_rng(0).normal(3, 2, (DRAWS, 8))
    assert 0.93 < coverage(mean_of, drawn, 3) < 0.97


def test_values_that_are_unknown_are_left_out() -> None:
    found = mean_of(np.array([1.0, np.nan, 3.0]))
    assert (found.mean, found.n) == (2.0, 2)
    assert found.low < 2 < found.high
    for interval in (mean_of, share_of, geometric_mean_of, gain_of):
        nothing = interval(np.full(3, np.nan))
        assert nothing.n == 0
        assert math.isnan(nothing.mean)
        assert interval(np.array([0.5, np.nan])).mean == pytest.approx(0.5)


def test_an_interval_has_a_width_where_all_are_right_and_none_where_nothing_is_known_of_it() -> None:
    assert share_of(np.ones(30)).low == pytest.approx(0.886, abs=1e-3)
    assert share_of(np.full(30, 0.2)).half > 0.02
    assert math.isnan(mean_of(np.ones(1)).low)
    few = gain_of(np.array([0.0] * 27 + [0.1] * 3))
    assert few.mean == pytest.approx(0.01)
    assert math.isnan(few.low)
    assert not math.isnan(gain_of(np.array([0.0] * 26 + [0.1] * 4)).low)


def test_amounts_of_zero_count() -> None:
    assert geometric_mean_of(np.zeros(5)) == Mean(0.0, 0.0, 0.0, 5)
    assert geometric_mean_of(np.array([0.1, 10.0])).mean == pytest.approx(1, rel=1e-4)
    some = geometric_mean_of(np.array([0.0, 1.0, 1.0, 1.0]))
    assert 0.01 < some.mean < 0.1
    assert some.low >= 0


def test_what_stands_after_plus_minus_is_the_larger_half() -> None:
    found = share_of(np.array([1.0] * 29 + [0.0]))
    assert found.half == found.mean - found.low > found.high - found.mean


def test_units_of_more_trials_count_more() -> None:
    rng = np.random.default_rng(3)
    n_trials = rng.integers(1, 9, (DRAWS, 40))
    drawn = rng.binomial(n_trials, 0.8) / n_trials
    found = [share_of(shares, weights) for shares, weights in zip(drawn, n_trials, strict=True)]
    assert found[0].mean == pytest.approx((drawn[0] * n_trials[0]).sum() / n_trials[0].sum())
    assert 0.92 < np.mean([one.low <= 0.8 <= one.high for one in found]) < 0.985
    assert share_of(drawn[0], np.full(40, 7)) == share_of(drawn[0])
