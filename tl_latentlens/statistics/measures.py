"""One figure for several readers at several hook names, with intervals, and paired gains of one reader over another."""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_latentlens.statistics.intervals import amount_of_log, gain_of, geometric_mean_of, log_amounts, mean_of, share_of

Kind = Literal["mean", "share", "geometric mean"]
_FIGURES = {"mean": mean_of, "share": share_of, "geometric mean": geometric_mean_of}


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
        kind: What the figure is: the "mean"; the mean of "share"s in [0, 1]; the "geometric mean" of amounts of 0 or more.
        about: What is measured, and what each null is, in a few sentences.
    """

    name: str
    values: dict[ReaderKey, Float[np.ndarray, " units"]] = field(repr=False)
    unit: str
    lower_is_better: bool = False
    kind: Kind = "mean"
    about: str = field(default="", repr=False)

    def table(self) -> pd.DataFrame:
        """A line for each reader and hook name: measure, hook_name ("" where None), reader, mean, low, high, n, unit, kind.

        `mean` is what `kind` says.
        """
        lines = []
        for key, values in self.values.items():
            line = {"measure": self.name, "hook_name": key.hook_name or "", "reader": key.reader}
            lines.append({**line, **vars(_FIGURES[self.kind](values)), "unit": self.unit, "kind": self.kind})
        return pd.DataFrame(lines)

    def gains(self, readers: list[str], over: str) -> pd.DataFrame:
        """The gain of each reader over another, averaged over the hook names, unit by unit (paired).

        Columns: measure, reader, mean (of the reader), gain (above 0: better), low, high, n, kind. The gain of a geometric mean
        is relative: 0.05 where the amounts are 5 % lower (or higher, where that is better). low and high are NaN where fewer
        than four units differ.
        """
        lines = []
        for reader in readers:
            own, other = self._mean_over_hooks(reader), self._mean_over_hooks(over)
            gain = gain_of(own - other)
            low, high = (gain.high, gain.low) if self.lower_is_better else (gain.low, gain.high)
            figures = {"gain": self._gain(gain.mean), "low": self._gain(low), "high": self._gain(high), "n": gain.n}
            lines.append({"measure": self.name, "reader": reader, "mean": self._mean(own), **figures, "kind": self.kind})
        return pd.DataFrame(lines)

    def _mean(self, of_units: Float[np.ndarray, " units"]) -> float:
        mean = mean_of(of_units).mean
        return amount_of_log(mean) if self.kind == "geometric mean" else mean

    def _gain(self, difference: float) -> float:
        """A difference of means, or of mean logarithms, as a gain."""
        sign = -1 if self.lower_is_better else 1
        return sign * (math.expm1(difference) if self.kind == "geometric mean" else difference) + 0.0  # never -0.0

    def _mean_over_hooks(self, reader: str) -> Float[np.ndarray, " units"]:
        """The mean of each unit over the hook names; of logarithms, where the figure is a geometric mean."""
        of_reader = [values for key, values in self.values.items() if key.reader == reader and key.hook_name is not None]
        if self.kind == "geometric mean":
            of_reader = [log_amounts(values) for values in of_reader]
        return np.mean(of_reader, axis=0)
