"""Means, shares and geometric means with 95 % intervals."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

_LEVEL = 0.975  # The quantile of both ends of a 95 % interval.
_PSEUDO_UNITS = 4  # Units of whole trials that the design effect of a share counts too.
_FLOOR = 1e-6  # Added to every amount before its logarithm: 0 has none.
_MIN_CHANGED = 4  # Fewer units that differ do not say how far units differ.


@dataclass(frozen=True)
class Mean:
    """A mean, its 95 % interval, and the number of values."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """The larger half of the interval, what stands after ±."""
        return max(self.high - self.mean, self.mean - self.low)


class _Interval(NamedTuple):
    low: float
    high: float


def mean_of(values: Float[np.ndarray, " n"]) -> Mean:
    """Mean of the values that are not NaN, with Student's t interval; NaN where there are none, no interval for one.

    It does not cover where few values are far larger than all others: see `geometric_mean_of`.
    """
    known = _known(values)
    if not len(known):
        return Mean(math.nan, math.nan, math.nan, 0)
    return Mean(float(known.mean()), *_t_interval(known), len(known))


def gain_of(gains: Float[np.ndarray, " n"]) -> Mean:
    """Mean of paired differences, as `mean_of`, without an interval where fewer than four of them are not 0.

    So few do not say how far units differ: of 30 units that agree, the next may differ much.
    """
    gain = mean_of(gains)
    if np.count_nonzero(_known(gains)) < _MIN_CHANGED:
        return Mean(gain.mean, math.nan, math.nan, gain.n)
    return gain


def share_of(shares: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | Int[np.ndarray, " n"] | None = None) -> Mean:
    """Mean of shares in [0, 1], one a unit, with its Wilson score interval; NaN units are left out.

    The interval (Wilson, 1927) has a width even where the mean is 0 or 1. Where a unit's share is of several trials, units
    vary less than units that are right or wrong, by the design effect: variance / (mean (1 - mean)), four units of whole
    trials counted in. The interval is then that of n / design effect units.

    Args:
        shares: One a unit.
        weights: How much each unit counts in the mean, above 0, its number of trials for instance; None: all the same.
    """
    known = _known(shares)
    n, z2 = len(known), float(stats.norm.ppf(_LEVEL)) ** 2
    if not n:
        return Mean(math.nan, math.nan, math.nan, 0)
    counts = np.ones(n) if weights is None else np.asarray(weights, float)[~np.isnan(np.asarray(shares, float))]
    counts = counts / counts.mean()
    mean = float((counts * known).mean())
    whole = mean * (1 - mean)
    variance = float(np.square(counts * (known - mean)).mean())
    effect = (n * variance / whole + _PSEUDO_UNITS) / (n + _PSEUDO_UNITS) if whole > 0 else 1.0
    n_effective = n / effect
    middle = (mean + z2 / (2 * n_effective)) / (1 + z2 / n_effective)
    half = math.sqrt(z2 * whole / n_effective + z2**2 / (4 * n_effective**2)) / (1 + z2 / n_effective)
    return Mean(mean, max(0.0, middle - half), min(1.0, middle + half), n)


def geometric_mean_of(amounts: Float[np.ndarray, " n"]) -> Mean:
    """Geometric mean of amounts of 0 or more, with Student's t interval of their logarithms; NaN amounts are left out.

    For amounts that spread over powers of ten, of which few make up most of the plain mean. 1e-6 is added before the logarithm
    and taken away at the end, so that amounts of 0 count too; a mean below 1e-6 is 0.
    """
    logs = mean_of(log_amounts(amounts))
    return Mean(amount_of_log(logs.mean), amount_of_log(logs.low), amount_of_log(logs.high), logs.n)


def log_amounts(amounts: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Natural logarithms of (1 + amount / 1e-6), for amounts of 0 or more."""
    return np.log1p(np.asarray(amounts, float) / _FLOOR)


def amount_of_log(log: float) -> float:
    """The amount that `log_amounts` gave a logarithm of; 0 where it is below 1e-6."""
    amount = _FLOOR * math.expm1(log)
    return 0.0 if amount < _FLOOR else amount


def _known(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " known"]:
    values = np.asarray(values, float)
    return values[~np.isnan(values)]


def _t_interval(values: Float[np.ndarray, " n"]) -> _Interval:
    n = len(values)
    if n < 2:
        return _Interval(math.nan, math.nan)
    half = float(stats.t.ppf(_LEVEL, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return _Interval(float(values.mean()) - half, float(values.mean()) + half)
