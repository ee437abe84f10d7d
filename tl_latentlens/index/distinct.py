"""Neighbors that list each row once, with the hook names at which it was found."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.index.found_rows import FoundRows
from tl_latentlens.index.grouped import RowSearch, nearest_of_groups

_MIN_DEPTH = 4  # times as many rows as are asked for are looked at first; then in four times as many, and so on
_DEEPER = 4


@dataclass(frozen=True)
class DistinctRows:
    """The nearest rows of each query, each once.

    Attributes:
        found: The rows, each at its best hook name.
        is_at: True for the hook names of the index at which each row is among the rows up to the last one, [q, k, names].
    """

    found: FoundRows
    is_at: Bool[Tensor, "q k names"]


def distinct_rows(
    search: RowSearch, n_queries: int, n_found: int, top_k: int, n_names: int, device: torch.device
) -> DistinctRows:
    """The nearest rows of each query, each once, at its best hook name.

    Args:
        search: The search of all rows.
        n_queries: Number of queries.
        n_found: Rows that a search of all of them finds, over all hook names.
        top_k: Rows of each query; there are as many.
        n_names: Hook names of the index.
        device: Of the search.
    """
    searched: list[tuple[Int[Tensor, " some"], FoundRows]] = []

    def remembered(places: Int[Tensor, " some"], depth: int) -> FoundRows:
        searched.append((places, search(places, depth)))
        return searched[-1][1]

    nothing = torch.empty(n_queries, 0, dtype=torch.int64, device=device)
    best = nearest_of_groups(remembered, n_queries, n_found, top_k, lambda rows: rows, nothing, (_MIN_DEPTH * top_k, _DEEPER))
    is_at = torch.zeros(n_queries, top_k, n_names, dtype=torch.bool, device=device)
    for places, found in searched:  # A deeper search of a query finds what the one before it found, and more.
        query, at, rank = _places_of(best.rows[places], found)
        is_at[places[query], rank, found.hook_ids[query, at]] = True
    return DistinctRows(best, is_at)


def _places_of(rows: Int[Tensor, "q k"], found: FoundRows) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Query, place among what was found, and rank of each hit of the chosen rows, up to the first hit of the last of them."""
    ordered, order = rows.sort(dim=-1)
    place = torch.searchsorted(ordered, found.rows).clamp(max=rows.shape[1] - 1)
    is_hit, rank = ordered.gather(-1, place) == found.rows, order.gather(-1, place)
    last = (is_hit & (rank == rows.shape[1] - 1)).long().argmax(-1)
    is_within = torch.arange(found.rows.shape[1], device=rows.device) <= last[:, None]
    query, at = (is_hit & is_within).nonzero(as_tuple=True)
    return query, at, rank[query, at]
