"""Geometry in which rows are compared: affine maps, means of their own, and hubs."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.search.ambient import own_arithmetic

# A row shorter than this share of its length before centering is treated as zero: only rounding noise is left of it.
ZERO_LENGTH_SHARE = 1e-6
# A shorter row has no direction: float32 loses its digits, and 1 / length leaves its range.
MIN_LENGTH = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Affine:
    """The map x → P((x - center) * weight), where P projects out the span of `removed`.

    Tensors are float64. Each is None where it does nothing.

    Attributes:
        center: [d].
        weight: [d], above 0.
        removed: Orthonormal rows, [m, d].
    """

    center: Float[Tensor, " d"] | None = None
    weight: Float[Tensor, " d"] | None = None
    removed: Float[Tensor, "m d"] | None = None

    @property
    def is_identity(self) -> bool:
        """True where there is no center, weight or span."""
        return self.center is None and self.weight is None and self.removed is None

    def __call__(self, vectors: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Transformed activations."""
        return self.linear(vectors if self.center is None else vectors - self.center)

    def linear(self, directions: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Transformed differences of activations: the center cancels out."""
        transformed = directions if self.weight is None else directions * self.weight
        for component in () if self.removed is None else self.removed:  # no matrix product: equal rows keep equal bits
            transformed = transformed - (transformed * component).sum(-1, keepdim=True) * component
        return transformed

    def transposed(self, queries: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The vector w for which w · (x - center) equals query · transform(x), for every x."""
        if self.weight is None and self.removed is None:
            return queries
        exact = queries.double()
        if self.removed is not None:
            exact = exact - exact @ self.removed.T @ self.removed
        return (exact if self.weight is None else exact * self.weight).to(queries)


@dataclass(frozen=True, eq=False)
class HubSample:
    """A sample of rows that tells which rows are hubs, near to everything.

    Attributes:
        units: Rows of the sample as they are compared, of length 1, float32, [s, d].
        row_ids: Their row numbers, [s].
        n_neighbors: The nearest rows of the sample to average over; fewer where the sample has fewer.
    """

    units: Float[Tensor, "s d"]
    row_ids: Int[Tensor, " s"]
    n_neighbors: int

    def starting_at(self, first_row: int) -> "HubSample":
        """The same sample, with rows numbered from `first_row` on."""
        return replace(self, row_ids=self.row_ids - first_row)

    def penalty(self, units: Float[Tensor, "n d"], first_row: int | None = None) -> Float[Tensor, " n"]:
        """Half the hubness of unit rows, float64.

        Args:
            units: Unit rows, float32.
            first_row: Row number of the first, so that no row is its own neighbor. None: they are no rows of the search.
        """
        own = None if first_row is None else torch.arange(first_row, first_row + len(units), device=units.device)
        return hubness(units, self.units, own, self.row_ids, self.n_neighbors) / 2

    def penalty_of_rows(self, units: Float[Tensor, "n d"], row_ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The same of rows by their numbers, none of which is its own neighbor."""
        return hubness(units, self.units, row_ids, self.row_ids, self.n_neighbors) / 2


@dataclass(frozen=True, eq=False)
class RowGeometry:
    """The transform and the penalty with which the rows of a search are compared with its queries.

    Similarities are cosines of transformed vectors. With `hubs`, half of each row's hubness is subtracted from its
    similarities, so that rows rank as in CSLS (Conneau et al. 2018, arXiv 1710.04087). CSLS also subtracts a term of the query.
    That term is the same for all rows, so it changes no ranking and is left out here.

    Attributes:
        affine: Applied to rows and queries.
        removes_own_mean: Subtract each row's own mean over d from it before, and each query's after `affine`.
        hubs: The sample for the hubness penalty. None: there is no penalty.
    """

    affine: Affine = Affine()
    removes_own_mean: bool = False
    hubs: HubSample | None = None

    @property
    def is_identity(self) -> bool:
        """True where rows are compared as they are, up to their length."""
        return self.affine.is_identity and not self.removes_own_mean

    @property
    def is_cosine(self) -> bool:
        """True where similarities are cosines: nothing is subtracted from them."""
        return self.hubs is None

    def to(self, device: torch.device) -> "RowGeometry":
        """The same on a device, with the affine map in float64."""
        parts = (None if part is None else part.to(device, torch.float64) for part in vars(self.affine).values())
        hubs = self.hubs and replace(self.hubs, units=self.hubs.units.to(device), row_ids=self.hubs.row_ids.to(device))
        return replace(self, affine=Affine(*parts), hubs=hubs)

    def starting_at(self, first_row: int) -> "RowGeometry":
        """The same for a search whose first row is `first_row` of the rows that `hubs` counts."""
        return self if self.hubs is None else replace(self, hubs=self.hubs.starting_at(first_row))

    def rows(self, vectors: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Rows transformed, and not normalized."""
        if self.removes_own_mean:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return self.affine(vectors)

    def normalized(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Stored rows as a search of all rows compares them, of length 1 (0 where nothing is left of a row), float32."""
        exact = vectors.double()
        stored_lengths = exact.norm(dim=-1, keepdim=True)
        transformed = self.rows(torch.where(stored_lengths > MIN_LENGTH, exact / stored_lengths, 0.0))
        has_direction = (stored_lengths > MIN_LENGTH)[:, 0]
        lengths = torch.where(has_direction & ~self.leaves_nothing(exact), transformed.norm(dim=-1), 0.0)
        return (transformed * self.row_scales(lengths, has_direction.double())[:, None]).float()

    def activations(self, vectors: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Queries that are activations, transformed; `normalize_queries` removes their own mean."""
        return self.affine(vectors)

    def directions(self, vectors: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Queries that are differences of activations, transformed; `normalize_queries` removes their own mean."""
        return self.affine.linear(vectors)

    def leaves_nothing(self, vectors: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
        """True for stored rows, float64, of which the transform leaves nothing, such as those that are the center itself.

        They are taken as they are stored, as the center is: at length 1 they would differ from it by what rounding added.
        """
        return self.row_scales(self.rows(vectors).norm(dim=-1), vectors.norm(dim=-1)) == 0

    def row_scales(self, lengths: Float[Tensor, " n"], stored_lengths: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """1 / length of transformed rows; 0 where the transform leaves nothing of a row.

        Args:
            lengths: Lengths of the transformed rows.
            stored_lengths: Their lengths before.
        """
        min_lengths = torch.zeros_like(lengths)
        if not self.is_identity:
            largest = 1.0 if self.affine.weight is None else self.affine.weight.max()
            min_lengths = ZERO_LENGTH_SHARE * largest * stored_lengths
        min_lengths = min_lengths.clamp(min=MIN_LENGTH)
        return torch.where(lengths > min_lengths, 1 / lengths, 0.0)


@own_arithmetic(full_products=True)
def hubness(
    units: Float[Tensor, "n d"],
    sample: Float[Tensor, "s d"],
    row_ids: Int[Tensor, " n"] | None,
    sample_ids: Int[Tensor, " s"],
    k: int,
) -> Float[Tensor, " n"]:
    """Mean cosine of rows to their k nearest rows of a sample: r of CSLS (Conneau et al. 2018, arXiv 1710.04087), float64.

    Args:
        units: Unit rows, float32.
        sample: Unit rows.
        row_ids: The number of each row, so that it is no neighbor of itself. None: none of them is in the sample.
        sample_ids: The number of each row of the sample.
        k: At least 1; fewer neighbors are averaged where the sample has fewer.
    """
    scores = units @ sample.T
    if row_ids is not None:
        scores.masked_fill_(row_ids[:, None] == sample_ids, -torch.inf)
    best = scores.topk(min(k, scores.shape[1]), dim=-1).values
    is_known = torch.isfinite(best)
    return torch.where(is_known, best, 0).sum(-1, dtype=torch.float64) / is_known.sum(-1).clamp(min=1)
