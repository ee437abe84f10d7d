"""Rows of one hook name, placed where they are searched: in this process, or in workers, from where they are only looked up."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.search.approximate import ApproximateSearch
from tl_latentlens.search.geometry import RowGeometry
from tl_latentlens.search.queries import normalize_queries
from tl_latentlens.search.tensors import as_tensor
from tl_latentlens.search.vectors import VectorSearch


@dataclass(frozen=True)
class SearchOptions:
    """The options by which the vectors of an index are held and searched; see `ContextualIndex`."""

    transform: str
    device: torch.device
    dtype: str
    approximate: bool | str
    memory_budget: int | None
    is_elsewhere: bool = False  # workers hold the vectors and search them


class PlacedSearch(NamedTuple):
    """A search among others.

    Attributes:
        first_row: The row, counted through the index, of the search's row 0.
        search: The search, a `VectorSearch`, or `RowsElsewhere`.
    """

    first_row: int
    search: Any


class RowsElsewhere:
    """The rows of one file that workers search; here some of them are looked up, in the memory map."""

    def __init__(self, vectors: Tensor | np.ndarray, geometry: RowGeometry, device: torch.device) -> None:
        """Keep the map.

        Args:
            vectors: The rows.
            geometry: How they are compared, with hubs counted from the first row on.
            device: Where what is looked up goes.
        """
        self.vectors, self.geometry, self._device = as_tensor(vectors), geometry, device

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.vectors)

    @property
    def d(self) -> int:
        """Width of the vectors."""
        return self.vectors.shape[1]

    def normalize_queries(self, queries: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Queries as they are compared; see `VectorSearch`."""
        return normalize_queries(queries, self.d, self._device, remove_means=self.geometry.removes_own_mean)

    def normalized_rows(self, row_ids: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Rows as they are compared, of length 1 (or 0), and what is subtracted from the similarities to each."""
        units = self.geometry.normalized(self.vectors[row_ids.cpu()].to(self._device))
        hubs = self.geometry.hubs
        return units, units.new_zeros(len(units)) if hubs is None else hubs.penalty_of_rows(units, row_ids).float()


class PlacedRows:
    """The rows of one hook name, or some of them, that can be ranked.

    Attributes:
        geometry: How they are compared.
        parts: Their searches, in row order.
    """

    geometry: RowGeometry
    parts: list[PlacedSearch]

    def __init__(
        self, geometry: RowGeometry, vectors: Sequence[tuple[int, Tensor | np.ndarray]], options: SearchOptions
    ) -> None:
        """Load vectors.

        Args:
            geometry: Fitted to all rows of the hook name.
            vectors: The row at which each part begins, and its vectors.
            options: How to search.
        """
        self.geometry = geometry
        self.parts = [PlacedSearch(first_row, self._make_search(first_row, part, options)) for first_row, part in vectors]

    def _make_search(
        self, first_row: int, vectors: Tensor | np.ndarray, options: SearchOptions
    ) -> VectorSearch | RowsElsewhere:
        if options.is_elsewhere:
            return RowsElsewhere(vectors, self.geometry.starting_at(first_row), options.device)
        factory = options.approximate if isinstance(options.approximate, str) else None
        search_class = partial(ApproximateSearch, factory=factory) if options.approximate else VectorSearch
        return search_class(
            vectors,
            options.device,
            options.dtype,
            unit_length=False,  # rounding to float16 left rows up to 3e-4 longer or shorter than 1
            geometry=self.geometry.starting_at(first_row),
            memory_budget=options.memory_budget,
            is_verified=True,  # a bank holds no NaN or inf, and its checksums say that it is as it was written
        )
