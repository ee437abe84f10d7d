"""Bins of density: features that are active on about as many rows are held against each other."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

_N_BINS = 10
_MIN_NULLS = 200  # so that a p-value of 0.005 can be reached


@dataclass(frozen=True, eq=False)
class DensityBins:
    """Bins of density.

    Attributes:
        edges: The largest density of each bin but the last, ascending.
    """

    edges: Float[np.ndarray, " edges"]

    @classmethod
    def of_nulls(cls, densities: Float[np.ndarray, " nulls"]) -> "DensityBins":
        """Up to ten bins that hold about as many nulls each, and at least 200: fewer bins where there are few nulls.

        Nulls of one density stand in one bin.

        Args:
            densities: The density of each null's feature.
        """
        values, counts = np.unique(densities, return_counts=True)
        n_up_to, size = counts.cumsum(), max(_MIN_NULLS, len(densities) / _N_BINS)
        edges, n_before = [], 0
        while len(densities) - n_before >= 2 * size:
            place = np.searchsorted(n_up_to, n_before + size)
            if len(densities) - n_up_to[place] < size:
                break
            edges.append(values[place])
            n_before = n_up_to[place]
        return cls(np.array(edges, float))

    def __len__(self) -> int:
        """How many bins there are."""
        return len(self.edges) + 1

    def places(self, densities: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The bin of each density."""
        return np.searchsorted(self.edges, densities)
