"""Geometry of vectors, whatever they are of: affine maps, and how near rows are to their neighbors."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """x → P((x - center) * weight), where P takes the span of `removed` away; float64, each None where it does nothing.

    Attributes:
        center: [d].
        weight: [d], above 0.
        removed: Orthonormal rows, [m, d].
    """

    center: Float[Tensor, " d"] | None = None
    weight: Float[Tensor, " d"] | None = None
    removed: Float[Tensor, "m d"] | None = None

    @property
    def changes_nothing(self) -> bool:
        """True where there is no center, weight or span."""
        return self.center is None and self.weight is None and self.removed is None

    def __call__(self, vectors: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Transform activations."""
        return self.linear(vectors if self.center is None else vectors - self.center)

    def linear(self, directions: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Transform differences of activations: the center cancels out."""
        left = directions if self.weight is None else directions * self.weight
        for component in () if self.removed is None else self.removed:  # no matrix product: equal rows keep equal bits
            left = left - (left * component).sum(-1, keepdim=True) * component
        return left

    def transposed(self, queries: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What has with x - center the product that a query has with a transformed x."""
        if self.weight is None and self.removed is None:
            return queries
        exact = queries.double()
        if self.removed is not None:
            exact = exact - exact @ self.removed.T @ self.removed
        return (exact if self.weight is None else exact * self.weight).to(queries)


def hubness(
    units: Float[Tensor, "n d"], first: int, sample: Float[Tensor, "s d"], sampled: Int[Tensor, " s"], k: int
) -> Float[Tensor, " n"]:
    """Mean cosine of rows to their k nearest of a sample, themselves left out: r of CSLS (Conneau et al. 2018, 1710.04087).

    Args:
        units: Unit rows, in float32.
        first: Row number of the first.
        sample: Unit rows.
        sampled: Their row numbers.
        k: How many; fewer where the sample has fewer.
    """
    scores = units @ sample.T
    rows = first + torch.arange(len(units), device=units.device)
    scores.masked_fill_(rows[:, None] == sampled, -torch.inf)
    best = scores.topk(min(k, scores.shape[1]), dim=-1).values
    known = torch.isfinite(best)
    return torch.where(known, best, 0).sum(-1, dtype=torch.float64) / known.sum(-1).clamp(min=1)
