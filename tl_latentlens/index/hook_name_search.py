"""The search among the rows of one hook name: a `VectorSearch` for each file, one geometry, one sample of random rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.index.placed_rows import PlacedRows, SearchOptions
from tl_latentlens.index.questions import Workers
from tl_latentlens.index.rows import PlacedBank
from tl_latentlens.index.transforms import fit_geometry, null_sample_rows
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.approximate import ApproximateSearch
from tl_latentlens.search.geometry import ZERO_LENGTH_SHARE, RowGeometry
from tl_latentlens.search.queries import normalize_queries

_MAX_CHANCE_NUMBERS = 2**24  # numbers of the rows, or of their similarities to the sample, that are held at once
_PRODUCT_ERROR = 1e-6  # a float32 product of unit vectors is off by about this


class NullSample(NamedTuple):
    """Rows that stand for random activations of a hook name.

    Attributes:
        row_ids: Their rows in the index.
        units: The rows as they are compared, of length 1.
        penalties: What is subtracted from the similarities to each.
    """

    row_ids: Int[Tensor, " n"]
    units: Float[Tensor, "n d"]
    penalties: Float[Tensor, " n"]


class HookNameSearch(PlacedRows):
    """All rows of one hook name, made searchable."""

    hook_name: str
    _banks: Sequence[PlacedBank]
    _device: torch.device
    _options: SearchOptions

    def __init__(
        self,
        hook_name: str,
        banks: Sequence[PlacedBank],
        options: SearchOptions,
        vectors: Sequence[tuple[int, Tensor | np.ndarray]] | None = None,
    ) -> None:
        """Fit the geometry to all rows, and load the vectors of each bank, shard by shard.

        Args:
            hook_name: The hook name, or that of a head.
            banks: The banks that hold it, in row order.
            options: How to search.
            vectors: Vectors that were loaded before, with the row at which each part begins; None: they are loaded.
        """
        self.hook_name, self._banks, self._device, self._options = hook_name, banks, options.device, options
        if vectors is None:
            parts = ((first_row, bank.vector_parts(hook_name)) for first_row, bank in banks)
            vectors = [(first_row + first, part) for first_row, of_bank in parts for first, part in of_bank]
        super().__init__(fit_geometry(options.transform, banks, hook_name, options.device), vectors, options)

    def with_transform(self, transform: str) -> "HookNameSearch":
        """A search of the same rows under another transform; they stay where they are, and are not loaded again."""
        is_elsewhere = self._options.is_elsewhere
        vectors = [(first_row, search.vectors if is_elsewhere else search.rows.vectors) for first_row, search in self.parts]
        return HookNameSearch(self.hook_name, self._banks, replace(self._options, transform=transform), vectors)

    @property
    def row_spans(self) -> dict[int, int]:
        """First row → number of rows, of each bank that holds the hook name."""
        return {first_row: bank.n_rows for first_row, bank in self._banks}

    @property
    def d(self) -> int:
        """Width of the vectors."""
        return self.parts[0].search.d

    @property
    def device(self) -> torch.device:
        """Where it searches."""
        return self._device

    @property
    def centers_activations(self) -> bool:
        """True where the mean is subtracted from activations, and not from directions."""
        return self.geometry.affine.center is not None

    @cached_property
    def null_sample(self) -> NullSample:
        """Up to 4,096 rows, evenly spread, that stand for random activations."""
        samples = null_sample_rows(self._banks)
        rows = np.concatenate([first_row + rows for (first_row, _), rows in zip(self._banks, samples, strict=True)])
        row_ids = torch.from_numpy(rows).to(self._device)
        return NullSample(row_ids, *self.normalized_rows(row_ids))

    def transform_activations(self, activations: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Activations as the rows are compared: unit vectors, and what is subtracted from the similarities to each.

        Raises:
            InvalidInputError: A wrong width, NaN, inf, or an activation of which the transform leaves nothing.
        """
        exact = normalize_queries(activations, self.d, self._device).double()
        transformed = self.geometry.activations(exact)
        units = normalize_queries(transformed, self.d, self._device, remove_means=self.geometry.removes_own_mean)
        hubs = self.geometry.hubs
        return units, units.new_zeros(len(units)) if hubs is None else hubs.penalty(units).float()

    @cached_property
    def _sample_mean(self) -> Float[Tensor, " d"]:
        return self.null_sample.units.double().mean(0)

    def centered_activations(self, activations: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Activations as the rows are compared, less the mean of the sample of rows, of length 1 (or 0), float64.

        Raises:
            InvalidInputError: As `transform_activations`.
        """
        return _unit(self.transform_activations(activations)[0] - self._sample_mean)

    def centered_rows(self, row_ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Rows as they are compared, less the mean of the sample of rows, of length 1 (0 for rows of length 0), float64."""
        units = _unit(self.normalized_rows(row_ids)[0].double())
        return _unit(units - self._sample_mean) * units.any(-1, keepdim=True)

    @own_arithmetic(full_products=True)
    def chances(self, row_ids: Int[Tensor, " n"], similarities: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The share of the sample's other rows that are at least this similar to each row; see `ContextualIndex.chances`."""
        chances = torch.ones_like(similarities)
        sample = self.null_sample
        rows_per_step = max(1, _MAX_CHANCE_NUMBERS // max(len(sample.units), self.d))
        for step in torch.arange(len(row_ids), device=row_ids.device).split(rows_per_step):
            units, penalties = self.normalized_rows(row_ids[step])
            scores = units @ sample.units.T - penalties[:, None]
            # The row may itself be of the sample, and is no random activation then.
            is_other = row_ids[step, None] != sample.row_ids
            is_near = (scores >= similarities[step, None] - _PRODUCT_ERROR) & is_other
            chances[step] = (1 + is_near.sum(-1)).float() / (1 + is_other.sum(-1))
        return chances

    def recall(self, vectors: Float[Tensor, "... d"] | np.ndarray, top_k: int) -> float:
        """Share of the exact neighbors that the search finds, in [0, 1]."""
        searches = [search for _, search in self.parts]
        shares = [search.recall(vectors, top_k) if isinstance(search, ApproximateSearch) else 1.0 for search in searches]
        return float(np.average(shares, weights=[len(search) for search in searches]))

    def normalized_rows(self, row_ids: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Rows as they are compared, of length 1 (or 0), and what is subtracted from the similarities to each."""
        units = torch.zeros(len(row_ids), self.d, dtype=torch.float32, device=self._device)
        penalties = torch.zeros(len(row_ids), dtype=torch.float32, device=self._device)
        for first_row, search in self.parts:
            is_of_part = (row_ids >= first_row) & (row_ids < first_row + len(search))
            units[is_of_part], penalties[is_of_part] = search.normalized_rows(row_ids[is_of_part] - first_row)
        return units, penalties


class Searches(dict[str, HookNameSearch]):
    """The loaded hook names of an index, in their order, and the workers that search for it.

    Attributes:
        transform: How vectors are compared.
        workers: None: the searches hold the rows themselves.
        geometries: Hook name → how its rows are compared.
    """

    transform: str
    workers: Workers | None
    geometries: dict[str, RowGeometry]

    def __init__(self, searches: Mapping[str, HookNameSearch], transform: str, workers: Workers | None = None) -> None:
        """Keep the searches."""
        super().__init__(searches)
        self.transform, self.workers = transform, workers
        self.geometries = {name: search.geometry for name, search in self.items()}

    def with_transform(self, transform: str) -> "Searches":
        """Searches of the same rows under another transform."""
        return Searches({name: search.with_transform(transform) for name, search in self.items()}, transform, self.workers)


def _unit(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(vectors, dim=-1, eps=ZERO_LENGTH_SHARE)
