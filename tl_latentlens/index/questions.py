"""Questions to the rows of an index, as they are put to its own searches or sent to workers that hold the rows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.index.found_rows import FoundRows
from tl_latentlens.search.geometry import RowGeometry


@dataclass(frozen=True)
class RowQuestion:
    """The nearest rows.

    Attributes:
        queries: Each hook name to search, in the order of the index, and the queries as it compares them.
        top_k: Rows of each query.
        query_hook_name: The hook name that the queries come from; None: they are directions.
    """

    queries: Mapping[str, Float[Tensor, "... d"]]
    top_k: int
    query_hook_name: str | None

    def to(self, device: torch.device) -> "RowQuestion":
        """The same on a device."""
        return replace(self, queries={name: units.to(device) for name, units in self.queries.items()})


@dataclass(frozen=True)
class LabelQuestion:
    """The nearest row of each of the nearest labels, such as words.

    Attributes:
        queries: Each hook name to search, in the order of the index, and the queries as it compares them; one at least.
        top_k: Labels of each query.
        excluded: Labels that each query leaves out, padded with numbers below -1.
        floor: A similarity that so many labels are known to reach.
    """

    queries: Mapping[str, Float[Tensor, "q d"]]
    top_k: int
    excluded: Int[Tensor, "q m"]
    floor: Float[Tensor, " q"]

    def to(self, device: torch.device) -> "LabelQuestion":
        """The same on a device."""
        queries = {name: units.to(device) for name, units in self.queries.items()}
        return replace(self, queries=queries, excluded=self.excluded.to(device), floor=self.floor.to(device))


@runtime_checkable
class Workers(Protocol):
    """The workers of an index, wherever they run: each holds some of its rows."""

    def rank_rows(self, transform: str, geometries: Mapping[str, RowGeometry], question: RowQuestion) -> list[FoundRows]:
        """The nearest rows of each worker.

        Args:
            transform: What the geometries are of.
            geometries: Hook name → how its rows are compared.
            question: What is searched.
        """
        ...

    def rank_labels(
        self, transform: str, geometries: Mapping[str, RowGeometry], question: LabelQuestion, labels: Int[Tensor, " rows"]
    ) -> list[FoundRows]:
        """The nearest row of each label, of each worker; `labels` are those of all rows of the index."""
        ...
