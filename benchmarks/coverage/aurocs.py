"""Intervals of AUROCs: of ten neighbors against fifty controls, whose chance to exceed each other is known."""

import numpy as np
from scipy import stats

from benchmarks.coverage.lines import Line
from benchmarks.measure import Settings
from tl_latentlens.statistics.auroc import auroc, auroc_interval

TITLE = "AUROC of ten against fifty, 95 % intervals"
SIZES = (10, 50)
_TRUTHS = (0.5, 0.8, 0.95, 0.995)
_WANTED = (0.93, 0.995)  # Near 1 few AUROCs can come out at all, so no interval has exactly 0.95.


def lines(settings: Settings) -> list[Line]:
    """Coverage by the true AUROC, for scores of two shapes."""
    return [of_truth(truth, shape, settings.draws) for shape in ("normal", "exponential") for truth in _TRUTHS]


def of_truth(truth: float, shape: str, draws: int) -> Line:
    """Scores of one shape, shifted or stretched so that positives exceed negatives with a known chance."""
    rng = np.random.default_rng(round(1000 * truth))
    if shape == "normal":
        positives = rng.standard_normal((draws, SIZES[0])) + np.sqrt(2) * stats.norm.ppf(truth)
        negatives = rng.standard_normal((draws, SIZES[1]))
    else:
        positives, negatives = rng.exponential(truth / (1 - truth), (draws, SIZES[0])), rng.exponential(1, (draws, SIZES[1]))
    found = auroc_interval(auroc(positives, negatives), *SIZES)
    covered = float(np.mean((found.low <= truth) & (truth <= found.high)))
    return Line(f"{shape}, true {truth}", f"{SIZES[0]}, {SIZES[1]}", 0.95, covered, draws, _WANTED)
