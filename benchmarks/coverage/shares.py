"""Intervals of shares: of units that are right or wrong, and of units that each have a share of several trials."""

import numpy as np
from jaxtyping import Float

from benchmarks.coverage.lines import Line
from benchmarks.measure import Settings
from tl_latentlens.statistics.intervals import share_of

TITLE = "Shares, 95 % intervals"
_SIZES = (30, 137, 300)
_SHARES = (0.03, 0.2, 0.5, 0.85, 0.97)


def lines(settings: Settings) -> list[Line]:
    """Coverage by share and number of units."""
    return [of_right_or_wrong(share, n, settings.draws) for n in _SIZES for share in _SHARES]


def of_right_or_wrong(share: float, n: int, draws: int) -> Line:
    """Units that are right with one probability."""
    drawn = np.random.default_rng([n, round(share * 1000)]).random((draws, n)) < share
    return _line(f"right or wrong, {share:.2f}", drawn.astype(float), share)


def _line(what: str, drawn: Float[np.ndarray, "draws n"], truth: float) -> Line:
    found = [share_of(one) for one in drawn]
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])
    return Line(what, drawn.shape[1], 0.95, float(covered), len(drawn))
