"""Means and shares with 95 % intervals, and paired gains of one reader over another."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """A mean, its 95 % interval, and the number of values."""

    mean: float
    low: float
    high: float
    n: int


def mean_of(values: Float[np.ndarray, " n"], seed: int = 0) -> Mean:
    """Mean of the values that are not NaN, with its percentile bootstrap interval; NaN where there are none."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    mean = low = high = known.mean() if len(known) else math.nan
    if len(np.unique(known)) > 1:
        rng = np.random.default_rng(seed)
        low, high = stats.bootstrap((known,), np.mean, method="percentile", batch=50, rng=rng).confidence_interval
    return Mean(float(mean), float(low), float(high), len(known))


def share_of(shares: Float[np.ndarray, " n"]) -> Mean:
    """Mean of shares in [0, 1], one a unit, with its Wilson score interval; NaN units are left out.

    The interval (Wilson, 1927) has a width even where the mean is 0 or 1. It counts each unit as one trial, and is too wide
    where a unit's share is of several trials.
    """
    known = np.asarray(shares, float)
    known = known[~np.isnan(known)]
    n, z2 = len(known), float(stats.norm.ppf(0.975)) ** 2
    if not n:
        return Mean(math.nan, math.nan, math.nan, 0)
    mean = float(known.mean())
    middle = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * mean * (1 - mean) / n + z2**2 / (4 * n**2)) / (1 + z2 / n)
    return Mean(mean, max(0.0, middle - half), min(1.0, middle + half), n)


class ReaderKey(NamedTuple):
    """A reader at a hook name; None stands for a reader that needs no hook name, such as a null."""

    reader: str
    hook_name: str | None = None


@dataclass(frozen=True, eq=False)
class Measure:
    """One figure for several readers at several hook names, value by value, so that readers can be compared in pairs.

    Attributes:
        name: What is measured, with its unit.
        values: One value for each unit (a sense, a token), for each reader; the same units throughout; NaN where unknown.
        unit: The name of the units, "tokens".
        lower_is_better: True for distances.
    """

    name: str
    values: dict[ReaderKey, Float[np.ndarray, " units"]] = field(repr=False)
    unit: str
    lower_is_better: bool = False

    def table(self, seed: int = 0) -> pd.DataFrame:
        """A line for each reader and hook name: measure, hook_name ("" where None), reader, mean, low, high, n, unit."""
        lines = []
        for key, values in self.values.items():
            line = {"measure": self.name, "hook_name": key.hook_name or "", "reader": key.reader}
            lines.append({**line, **vars(mean_of(values, seed)), "unit": self.unit})
        return pd.DataFrame(lines)

    def gains(self, readers: list[str], over: str, seed: int = 0) -> pd.DataFrame:
        """The gain of each reader over another, averaged over the hook names, with a bootstrap over units (paired).

        Columns: measure, reader, mean (of the reader), gain (above 0: better), low, high, n.
        """
        sign = -1 if self.lower_is_better else 1
        lines = []
        for reader in readers:
            gain = mean_of(sign * (self._mean_over_hooks(reader) - self._mean_over_hooks(over)), seed)
            mean = mean_of(self._mean_over_hooks(reader), seed).mean
            figures = {"mean": mean, "gain": gain.mean, "low": gain.low, "high": gain.high, "n": gain.n}
            lines.append({"measure": self.name, "reader": reader, **figures})
        return pd.DataFrame(lines)

    def _mean_over_hooks(self, reader: str) -> Float[np.ndarray, " units"]:
        of_reader = [values for key, values in self.values.items() if key.reader == reader and key.hook_name is not None]
        return np.mean(of_reader, axis=0)
