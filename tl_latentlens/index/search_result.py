"""The result of a search: numbers on the device, and their texts, which are looked up when they are asked for."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.index.rows import BankRows
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.views.context import Context
from tl_latentlens.views.data import NeighborLine
from tl_latentlens.views.notebook import search_html

_Result = TypeVar("_Result", bound=Any)


@runtime_checkable
class SearchedIndex(Protocol):
    """The members of `ContextualIndex` that its results use."""

    @property
    def bank_rows(self) -> BankRows:
        """The rows of its banks."""
        ...

    @property
    def model_info(self) -> ModelInfo:
        """The model of its banks."""
        ...

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hook names that `hook_ids` count."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it searches."""
        ...

    @property
    def transform(self) -> str:
        """How it compares vectors."""
        ...

    def neighbor(
        self, row: int, hook_id: int, similarity: float, chance: float | None = None, hook_ids: Sequence[int] = ()
    ) -> Neighbor:
        """The neighbor at one row."""
        ...

    def neighbor_line(
        self, row: int, hook_id: int, similarity: float, chance: float | None = None, hook_ids: Sequence[int] = ()
    ) -> NeighborLine:
        """The same, as views draw it."""
        ...

    def contexts(self, rows: Iterable[int], width: int) -> dict[int, Context]:
        """Rows in their texts."""
        ...

    def chances(self, found: "SearchResult") -> Float[Tensor, "... k"]:
        """The chance of each neighbor."""
        ...


class OnDevice:
    """A dataclass of tensors over queries, any leading shape, on the device of its `index`."""

    def __getitem__(self: _Result, query: Any) -> _Result:
        """The result of some of the queries, chosen as in their leading shape."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{key: value[query] for key, value in values.items() if isinstance(value, Tensor)})

    def __getstate__(self: Any) -> dict[str, Any]:
        """The numbers in the computer's memory, since another process may number its devices otherwise."""
        return {f.name: value.cpu() if isinstance(value := getattr(self, f.name), Tensor) else value for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the numbers on the device of the index that came along."""
        device = state["index"].device
        self.__dict__.update({key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()})


@dataclass(frozen=True)
class SearchResult(OnDevice):
    """Neighbors of each query, nearest first; ties by hook order, then row.

    Attributes:
        similarities: Cosines in [-1, 1], float32, [..., k].
        rows: Rows of the index, int64, [..., k].
        hook_ids: Places in `index.hook_names`, int64, [..., k].
        index: The `ContextualIndex` that was searched.
        chances: How likely a random activation comes as near to each row, in (0, 1], [..., k]; None where it was not asked for.
        known: How well the bank knows each query, in (0, 1], [...] (`ContextualIndex.known`); at most 0.05: it does not. None
            where it was not asked for, and for queries that are no activations of a hook name that the index holds; NaN for
            visual tokens.
        is_at: True for the hook names at which each row was found, where each row is listed once, [..., k, hook names]; else
            None.
        use_chances: How likely another use of the query's token comes as near to its nearest row, in (0, 1], [...]; NaN where
            that is another token (`ContextualIndex.use_chances`). None where the token was not known.
    """

    similarities: Float[Tensor, "... k"]
    rows: Int[Tensor, "... k"]
    hook_ids: Int[Tensor, "... k"]
    index: SearchedIndex = field(repr=False)
    chances: Float[Tensor, "... k"] | None = None
    known: Float[Tensor, "..."] | None = None
    use_chances: Float[Tensor, "..."] | None = None
    is_at: Bool[Tensor, "... k names"] | None = None

    def _repr_html_(self) -> str:
        places = (", ".join(map(str, place)) for place in np.ndindex(*self.rows.shape[:-1]))
        queries = ((place, self.neighbor_lines(i), self.known_of(i)) for i, place in enumerate(places))
        return search_html(queries, int(np.prod(self.rows.shape[:-1])))

    def neighbors(self) -> Any:
        """Neighbors in nested lists of the queries' leading shape; text is looked up here and not before."""
        return in_leading_shape(self.neighbors_of, self.rows.shape[:-1])

    def neighbors_of(self, query: int) -> list[Neighbor]:
        """Neighbors of one query, counted over the flattened leading shape."""
        return [self.index.neighbor(*fields) for fields in self._fields_of(query)]

    def neighbor_lines(self, query: int, n_neighbors: int | None = None) -> list[NeighborLine]:
        """The same as views draw them, at most so many; None: all."""
        return [self.index.neighbor_line(*fields) for fields in self._fields_of(query)[:n_neighbors]]

    def known_of(self, query: int) -> float | None:
        """How well the bank knows one query; None where it was not computed."""
        return _number_of(self.known, query)

    def use_chance_of(self, query: int) -> float | None:
        """How likely another use of one query's token comes as near to its nearest row; None where there is no such figure."""
        return _number_of(self.use_chances, query)

    def with_chances(self) -> "SearchResult":
        """The same neighbors with `chances`."""
        return self if self.chances is not None else replace(self, chances=self.index.chances(self))

    def _fields_of(self, query: int) -> list[tuple[Any, ...]]:
        """Row, hook id, similarity, chance (or None), and the hook ids at which it was found, of each neighbor of a query."""
        rows, hook_ids, similarities, *chances = (values[query].tolist() for values in self._on_host)
        is_at = None if self.is_at is None else self.is_at.reshape(-1, *self.is_at.shape[-2:])[query].cpu().numpy()
        found_at = [[]] * len(rows) if is_at is None else [np.flatnonzero(at).tolist() for at in is_at]
        return list(zip(rows, hook_ids, similarities, *(chances or [[None] * len(rows)]), found_at, strict=True))

    @cached_property
    def _on_host(self) -> list[np.ndarray]:
        k = self.rows.shape[-1]
        tensors = [self.rows, self.hook_ids, self.similarities, *([] if self.chances is None else [self.chances])]
        return [tensor.reshape(-1, k).cpu().numpy() for tensor in tensors]


def in_leading_shape(list_of: Callable[[int], list[Any]], shape: Sequence[int]) -> Any:
    """The list of each query, counted over the flattened shape, in nested lists of that shape; of one query, its list."""
    nested = [list_of(i) for i in range(math.prod(shape))]
    for axis in range(len(shape) - 1, 0, -1):
        size, n_lists = shape[axis], math.prod(shape[:axis])
        nested = [nested[i * size : (i + 1) * size] for i in range(n_lists)]
    return nested if shape else nested[0]


def _number_of(numbers: Float[Tensor, "..."] | None, query: int) -> float | None:
    """The number of one query; None where there is none, or NaN."""
    number = math.nan if numbers is None else numbers.reshape(-1)[query].item()
    return None if math.isnan(number) else number
