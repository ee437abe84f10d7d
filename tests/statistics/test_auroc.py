"""Intervals of AUROCs hold the true value as often as they say, near 1 too."""

import numpy as np
import pytest
from scipy import stats

from tl_latentlens.statistics.auroc import auroc, auroc_interval


def drawn(truth: float, kind: str, n_positives: int, n_negatives: int, draws: int = 2000) -> np.ndarray:
    """AUROCs of samples whose positives exceed negatives with a known chance."""
    rng = np.random.default_rng(round(1000 * truth))
    if kind == "normal":
        shift = np.sqrt(2) * stats.norm.ppf(truth)
        return auroc(rng.standard_normal((draws, n_positives)) + shift, rng.standard_normal((draws, n_negatives)))
    scale = truth / (1 - truth)
    return auroc(rng.exponential(scale, (draws, n_positives)), rng.exponential(1, (draws, n_negatives)))


@pytest.mark.parametrize("sizes", [(5, 25), (10, 50), (40, 200)])
@pytest.mark.parametrize("kind", ["normal", "exponential"])
@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95, 0.995])
def test_intervals_hold_the_truth(truth: float, kind: str, sizes: tuple[int, int]) -> None:
    found = auroc_interval(drawn(truth, kind, *sizes), *sizes)
    assert np.mean((found.low <= truth) & (truth <= found.high)) >= 0.925


def test_all_right_and_all_wrong_have_a_width() -> None:
    found = auroc_interval(np.array([1.0, 0.0]), 10, 50)
    np.testing.assert_allclose([found.low[0], found.high[0]], [0.841, 1], atol=1e-3)
    np.testing.assert_allclose([found.low[1], found.high[1]], [0, 0.058], atol=1e-3)
    more = auroc_interval(np.array([1.0]), 100, 500)
    assert 0.95 < more.low[0] < 1


def test_intervals_hold_what_was_found_and_grow_with_it() -> None:
    values = np.linspace(0, 1, 201)
    found = auroc_interval(values, 10, 50)
    assert (found.low >= 0).all()
    assert (found.high <= 1).all()
    assert (found.low <= values).all()
    assert (values <= found.high).all()
    assert (np.diff(found.low) >= 0).all()
    assert (np.diff(found.high) >= 0).all()
    mirrored = auroc_interval(1 - values, 50, 10)
    np.testing.assert_allclose(mirrored.low, 1 - found.high, atol=1e-9)


def test_what_is_unknown_stays_unknown() -> None:
    found = auroc_interval(np.array([np.nan, 0.5]), 10, 50)
    assert np.isnan([found.low[0], found.high[0]]).all()
    assert found.low[1] < 0.5 < found.high[1]
    assert len(auroc_interval(np.zeros(0), 10, 50).low) == 0
