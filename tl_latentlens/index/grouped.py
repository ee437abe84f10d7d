"""The nearest row of each group of rows, from a search that goes as deep as it must: each row once, or each word once."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.index.cross_layer import search_hook_names
from tl_latentlens.index.found_rows import FoundRows, first_of_each_group
from tl_latentlens.index.hook_name_search import HookNameSearch

_MAX_NUMBERS = 2**22  # pairs of a query and a row that are looked at together

RowSearch = Callable[[Int[Tensor, " some"], int], FoundRows]
"""The nearest rows of some queries, by their places, and how many rows."""


def row_search(
    queries: Mapping[str, Float[Tensor, "n d"]],
    searches: Mapping[str, HookNameSearch],
    query_hook_name: str | None,
    *,
    is_approximate: bool,
) -> RowSearch:
    """The search of all rows for some of the queries."""

    def search(places: Int[Tensor, " some"], depth: int) -> FoundRows:
        units = {name: queries[name][places] for name in queries}
        return search_hook_names(units, searches, depth, query_hook_name, is_approximate=is_approximate)

    return search


def nearest_of_groups(
    search: RowSearch,
    n_queries: int,
    n_found: int,
    top_k: int,
    groups_of: Callable[[Int[Tensor, "..."]], Int[Tensor, "..."]],
    unlike: Int[Tensor, "queries groups"],
    depths: tuple[int, int],
) -> FoundRows:
    """The nearest row of each of the `top_k` nearest groups of each query; -1 and NaN where there are fewer groups.

    Args:
        search: The search of all rows.
        n_queries: Number of queries.
        n_found: Rows that a search of all of them finds, over all hook names.
        top_k: Groups of each query.
        groups_of: Gives the group of each row; below 0: none.
        unlike: The groups that each query leaves out, padded with numbers below -1.
        depths: Rows of each query in which groups are looked for first, and how many times as many next, and so on.
    """
    device = unlike.device
    best = FoundRows(
        torch.full((n_queries, top_k), torch.nan, dtype=torch.float32, device=device),
        torch.full((n_queries, top_k), -1, device=device),
        torch.full((n_queries, top_k), -1, device=device),
    )
    first_depth, deeper = depths
    left, depth = torch.arange(n_queries, device=device), min(first_depth, n_found)
    while len(left) and depth:
        is_short = []
        for places in left.split(max(1, _MAX_NUMBERS // depth)):
            found = search(places, depth)
            query, rank, at = first_of_each_group(groups_of(found.rows), unlike[places], top_k)
            for chosen, rows in zip(vars(best).values(), vars(found).values(), strict=True):
                chosen[places[query], rank] = rows[query, at]
            is_short.append(best.rows[places, -1] < 0)
        left = left[torch.cat(is_short)] if depth < n_found else left[:0]
        depth = min(deeper * depth, n_found)
    return best
