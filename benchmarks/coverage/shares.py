"""Intervals of shares: of units that are right or wrong, and of units that each have a share of five trials."""

import numpy as np
from jaxtyping import Float

from benchmarks.coverage.lines import Line
from benchmarks.measure import Settings
from tl_latentlens.statistics.intervals import share_of

TITLE = "Shares, 95 % intervals"
SIZES = (30, 137, 300)
_SHARES = (0.03, 0.2, 0.5, 0.85, 0.97)
_ALIKE = {"hardly alike": 0.1, "alike": 0.5, "nearly all alike": 0.9}  # the correlation of two trials of a unit


def lines(settings: Settings) -> list[Line]:
    """Coverage by share, number of units, and how alike the trials of a unit are."""
    found = [of_right_or_wrong(share, n, settings.draws) for n in SIZES for share in _SHARES]
    return found + [of_five_trials(share, n, alike, settings.draws) for n in SIZES for share in _SHARES for alike in _ALIKE]


def of_right_or_wrong(share: float, n: int, draws: int) -> Line:
    """Units that are right with one probability."""
    drawn = np.random.default_rng([n, round(share * 1000)]).random((draws, n)) < share
    return _line(f"right or wrong, {share:.2f}", drawn.astype(float), share)


def of_five_trials(share: float, n: int, alike: str, draws: int) -> Line:
    """Units whose own probability comes from a beta distribution, five trials each."""
    rng, spread = np.random.default_rng([n, round(share * 1000)]), 1 / _ALIKE[alike] - 1
    own = rng.beta(share * spread, (1 - share) * spread, (draws, n))
    return _line(f"shares of five trials, {alike}, {share:.2f}", rng.binomial(5, own) / 5, share)


def _line(what: str, drawn: Float[np.ndarray, "draws n"], truth: float) -> Line:
    found = [share_of(one) for one in drawn]
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])
    return Line(what, drawn.shape[1], 0.95, float(covered), len(drawn))
