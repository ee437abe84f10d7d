"""The search over several hook names at once: queries as each compares them, and all their rows ranked together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.hook_name_search import HookNameSearch
from tl_latentlens.index.hook_names import require_hook_names
from tl_latentlens.search.approximate import approximate_top_k_of_parts
from tl_latentlens.search.driver import top_k_of_parts
from tl_latentlens.search.labels import LabelQuery, top_k_labels_of_parts
from tl_latentlens.search.queries import normalize_queries
from tl_latentlens.search.topk import TopK
from tl_latentlens.search.vectors import VectorSearch


@dataclass(frozen=True)
class FoundRows:
    """The nearest rows of each query, nearest first; ties by hook order, then row.

    Attributes:
        similarities: Float32, [..., k].
        rows: Rows of the index, int64, [..., k].
        hook_ids: Which of the hook names each row was found in, int64, [..., k].
    """

    similarities: Float[Tensor, "... k"]
    rows: Int[Tensor, "... k"]
    hook_ids: Int[Tensor, "... k"]


@dataclass(frozen=True)
class _Part:
    """The rows of one bank and hook name, and the queries as they are compared with these rows."""

    hook_id: int
    first_row: int
    search: VectorSearch
    queries: Float[Tensor, "... d"]


def transform_queries(
    vectors: Float[Tensor, "... d"],
    searches: Mapping[str, HookNameSearch],
    searched: Sequence[str],
    query_hook_name: str | None,
    device: torch.device,
) -> dict[str, Float[Tensor, "... d"]]:
    """Hook name → the queries as they are compared with its rows.

    Args:
        vectors: The queries, of the width of the searched hook names.
        searches: The loaded hook names.
        searched: The hook names to search.
        query_hook_name: The hook name that the queries come from; None: they are directions.
        device: The device of the searches.

    Raises:
        InvalidInputError: NaN, inf or zero vectors, or another width than that of `query_hook_name`.
        UnknownHookError: `query_hook_name` is needed and not loaded.
    """
    width = vectors.shape[-1]
    units = normalize_queries(vectors, width, device)
    own_geometry = None
    if query_hook_name is not None and any(search.centers_activations for search in searches.values()):
        require_hook_names([query_hook_name], list(searches))
        if (own_width := searches[query_hook_name].d) != width:
            raise InvalidInputError(f"got vectors of width {width}; {query_hook_name} has width {own_width}")
        own_geometry = searches[query_hook_name].geometry
    queries, exact = {}, None
    for name in searched:
        geometry = searches[name].geometry
        if geometry.is_identity:
            queries[name] = units
            continue
        exact = units.double() if exact is None else exact
        transformed = geometry.directions(exact) if own_geometry is None else own_geometry.activations(exact)
        queries[name] = searches[name].parts[0].search.normalize_queries(transformed)
    return queries


def search_hook_names(
    queries: Mapping[str, Float[Tensor, "... d"]],
    searches: Mapping[str, HookNameSearch],
    top_k: int,
    query_hook_name: str | None,
    *,
    is_approximate: bool,
) -> FoundRows:
    """The nearest rows among several hook names, ranked together.

    Args:
        queries: Each hook name to search, in the order of `searches`, and the queries as it compares them.
        searches: The loaded hook names.
        top_k: Rows of each query.
        query_hook_name: The hook name that the queries come from. It is searched first, since it is likely to have the nearest.
        is_approximate: FAISS proposes the rows.
    """
    parts = _parts_of(queries, searches)
    if is_approximate:
        best = approximate_top_k_of_parts([part.search for part in parts], [part.queries for part in parts], top_k)
    else:
        hook_names = list(searches)
        search_first = next((i for i, part in enumerate(parts) if hook_names[part.hook_id] == query_hook_name), 0)
        best = top_k_of_parts([part.search.part(part.queries) for part in parts], top_k, search_first=search_first)
    return _in_index(best, parts, is_cosine=all(searches[name].geometry.is_cosine for name in queries))


def search_labels(
    queries: Mapping[str, Float[Tensor, "q d"]],
    searches: Mapping[str, HookNameSearch],
    top_k: int,
    labels: Int[Tensor, " rows"],
    excluded: Int[Tensor, "q m"],
    floor: Float[Tensor, " q"],
) -> FoundRows:
    """The nearest row of each of the nearest labels among several hook names, ranked together; -1 and NaN past the last.

    Args:
        queries: Each hook name to search, in the order of `searches`, and the queries as it compares them; one at least.
        searches: The loaded hook names.
        top_k: Labels of each query.
        labels: The label of each row of the index; see `LabelQuery`.
        excluded: Labels that each query leaves out.
        floor: A similarity that so many labels are known to reach.
    """
    parts = _parts_of(queries, searches)
    of_parts = torch.cat([labels[part.first_row : part.first_row + len(part.search)] for part in parts])
    best = top_k_labels_of_parts(
        [part.search.part(part.queries) for part in parts], top_k, LabelQuery(of_parts, excluded, floor)
    )
    is_missing = best.rows >= len(of_parts)
    is_cosine = all(searches[name].geometry.is_cosine for name in queries)
    found = _in_index(TopK(best.similarities, best.rows.masked_fill(is_missing, 0)), parts, is_cosine=is_cosine)
    similarities = found.similarities.masked_fill(is_missing, torch.nan)
    return FoundRows(similarities, found.rows.masked_fill(is_missing, -1), found.hook_ids.masked_fill(is_missing, -1))


def _parts_of(queries: Mapping[str, Float[Tensor, "... d"]], searches: Mapping[str, HookNameSearch]) -> list[_Part]:
    """The parts of a search. They stand in hook order, then row order, so that ties are broken in that order."""
    hook_ids = {name: hook_id for hook_id, name in enumerate(searches)}
    return [
        _Part(hook_ids[name], first_row, search, units)
        for name, units in queries.items()
        for first_row, search in searches[name].parts
    ]


def _in_index(best: TopK, parts: Sequence[_Part], *, is_cosine: bool) -> FoundRows:
    """Rows that are counted through the parts, as rows and hook names of the index."""
    device = best.rows.device
    starts = torch.tensor(np.cumsum([0, *(len(part.search) for part in parts[:-1])]), device=device)
    part_ids = torch.searchsorted(starts, best.rows, right=True) - 1
    part_hook_ids = torch.tensor([part.hook_id for part in parts], device=device)
    first_rows = torch.tensor([part.first_row for part in parts], device=device)
    similarities = best.similarities.clamp(-1, 1) if is_cosine else best.similarities
    return FoundRows(similarities, best.rows - starts[part_ids] + first_rows[part_ids], part_hook_ids[part_ids])


def n_found_in(hook_names: Iterable[str], searches: Mapping[str, HookNameSearch]) -> int:
    """Rows that a search of all rows of some hook names finds."""
    return sum(len(part.search) for name in hook_names for part in searches[name].parts)


def centered_rows(
    searches: Mapping[str, HookNameSearch], rows: Int[Tensor, " n"], hook_ids: Int[Tensor, " n"], d: int
) -> Float[Tensor, "n d"]:
    """Rows of several hook names of width `d` as they are compared, each less the mean of its own; see `HookNameSearch`."""
    hook_names = list(searches)
    units = torch.zeros(len(rows), d, dtype=torch.float64, device=rows.device)
    for hook_id in hook_ids.unique().tolist():
        places = hook_ids == hook_id
        units[places] = searches[hook_names[hook_id]].centered_rows(rows[places])
    return units
