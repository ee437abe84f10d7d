"""Contexts spread evenly over a feature's activations: a few from each tenth of its largest one."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tl_latentlens.directions.features.activity import Activity
from tl_latentlens.directions.features.detection import N_TENTHS

PER_INTERVAL = 2  # Contexts of each interval.


@dataclass(frozen=True, eq=False)
class IntervalRows:
    """Rows of some features, `PER_INTERVAL` from each tenth of a feature's largest activation, the lowest first.

    Attributes:
        rows: Rows of the index, interval after interval; -1: none.
        largest: The largest activation of each feature.
        fractions: The share of the contexts with a feature whose largest activation is in each interval.
    """

    rows: Int[np.ndarray, "f rows"]
    largest: Float[np.ndarray, " f"]
    fractions: Float[np.ndarray, "f tenths"]

    def interval(self, place: int, column: int) -> tuple[float, float, float]:
        """Least and largest activation of the interval of a row, and the share of contexts in it."""
        tenth = column // PER_INTERVAL
        width = float(self.largest[place]) / N_TENTHS
        return width * tenth, width * (tenth + 1), float(self.fractions[place, tenth])


def interval_rows(activity: Activity, without: Int[np.ndarray, "f k"]) -> IntervalRows:
    """The rows with the largest activation of drawn contexts, a few from each interval, but those of `without`."""
    drawn = [activity.evidence.fitted, activity.evidence.held_out]
    rows, activations, counts = (
        np.concatenate([getattr(one, name) for one in drawn], 1) for name in ("rows", "activations", "counts")
    )
    largest, shape = activity.top.activations[:, 0], (len(rows), N_TENTHS)
    tenths = N_TENTHS * activations / np.maximum(largest, 1e-30)[:, None]
    cells = np.arange(len(rows))[:, None] * N_TENTHS + np.minimum(tenths, N_TENTHS - 1).astype(np.int64)
    is_drawn = rows >= 0
    sums = np.bincount(cells[is_drawn], counts[is_drawn], len(rows) * N_TENTHS).reshape(shape)
    is_new = is_drawn & ~(rows[:, :, None] == without[:, None]).any(-1)
    cell, row = cells[is_new], rows[is_new]
    order = np.argsort(cell, kind="stable")
    n_of_cell = np.bincount(cell, minlength=len(rows) * N_TENTHS)
    rank = np.arange(len(order)) - (n_of_cell.cumsum() - n_of_cell)[cell[order]]
    chosen = np.full((len(rows) * N_TENTHS, PER_INTERVAL), -1)
    is_first = rank < PER_INTERVAL
    chosen[cell[order][is_first], rank[is_first]] = row[order][is_first]
    return IntervalRows(chosen.reshape(len(rows), -1), largest, sums / np.maximum(sums.sum(-1, keepdims=True), 1e-30))
