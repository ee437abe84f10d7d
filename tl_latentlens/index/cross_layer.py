"""The search over several hook names at once: queries as each compares them, and all their rows ranked together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.found_rows import FoundRows, ranked_together, ranked_together_by_label
from tl_latentlens.index.hook_name_search import HookNameSearch, Searches
from tl_latentlens.index.hook_names import require_hook_names
from tl_latentlens.index.placed_rows import PlacedRows
from tl_latentlens.index.questions import LabelQuestion, RowQuestion
from tl_latentlens.search.approximate import approximate_top_k_of_parts
from tl_latentlens.search.driver import top_k_of_parts
from tl_latentlens.search.labels import LabelQuery, top_k_labels_of_parts
from tl_latentlens.search.queries import normalize_queries
from tl_latentlens.search.topk import TopK
from tl_latentlens.search.vectors import VectorSearch


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
    question = RowQuestion(queries, top_k, query_hook_name)
    if isinstance(searches, Searches) and searches.workers is not None:
        return ranked_together(searches.workers.rank_rows(searches.transform, searches.geometries, question), top_k)
    return nearest_rows(question, searches, list(searches), is_approximate=is_approximate)


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
    question = LabelQuestion(queries, top_k, excluded, floor)
    if isinstance(searches, Searches) and searches.workers is not None:
        answers = searches.workers.rank_labels(searches.transform, searches.geometries, question, labels)
        return ranked_together_by_label(answers, top_k, labels)
    return nearest_of_labels(question, searches, list(searches), lambda first, n: labels[first : first + n])


def nearest_rows(
    question: RowQuestion, searches: Mapping[str, PlacedRows], hook_names: Sequence[str], *, is_approximate: bool = False
) -> FoundRows:
    """The nearest of the rows at hand.

    Args:
        question: What is searched.
        searches: Hook name → its rows, or some of them; those that are missing have none here.
        hook_names: All of the index, which the hook ids count.
        is_approximate: FAISS proposes the rows.
    """
    queries, top_k = question.queries, question.top_k
    parts = _parts_of(queries, searches, hook_names)
    if not parts:
        return FoundRows.none((*next(iter(queries.values())).shape[:-1], 0), next(iter(queries.values())).device)
    if is_approximate:
        best = approximate_top_k_of_parts([part.search for part in parts], [part.queries for part in parts], top_k)
    else:
        search_first = next((i for i, part in enumerate(parts) if hook_names[part.hook_id] == question.query_hook_name), 0)
        best = top_k_of_parts([part.search.part(part.queries) for part in parts], top_k, search_first=search_first)
    return _in_index(best, parts, is_cosine=all(searches[name].geometry.is_cosine for name in queries if name in searches))


def nearest_of_labels(
    question: LabelQuestion,
    searches: Mapping[str, PlacedRows],
    hook_names: Sequence[str],
    labels_of: Callable[[int, int], Int[Tensor, " n"]],
) -> FoundRows:
    """The nearest of the rows at hand of each label; -1 and NaN past the last.

    Args:
        question: What is searched.
        searches: As `nearest_rows` takes them.
        hook_names: All of the index.
        labels_of: Gives the labels of rows, by the first and their number.
    """
    parts = _parts_of(question.queries, searches, hook_names)
    if not parts:
        return FoundRows.none((len(question.floor), question.top_k), question.floor.device)
    of_parts = torch.cat([labels_of(part.first_row, len(part.search)) for part in parts])
    query = LabelQuery(of_parts, question.excluded, question.floor)
    best = top_k_labels_of_parts([part.search.part(part.queries) for part in parts], question.top_k, query)
    is_missing = best.rows >= len(of_parts)
    is_cosine = all(searches[name].geometry.is_cosine for name in question.queries if name in searches)
    found = _in_index(TopK(best.similarities, best.rows.masked_fill(is_missing, 0)), parts, is_cosine=is_cosine)
    similarities = found.similarities.masked_fill(is_missing, torch.nan)
    return FoundRows(similarities, found.rows.masked_fill(is_missing, -1), found.hook_ids.masked_fill(is_missing, -1))


def _parts_of(
    queries: Mapping[str, Float[Tensor, "... d"]], searches: Mapping[str, PlacedRows], hook_names: Sequence[str]
) -> list[_Part]:
    """The parts of a search. They stand in hook order, then row order, so that ties are broken in that order."""
    hook_ids = {name: hook_id for hook_id, name in enumerate(hook_names)}
    return [
        _Part(hook_ids[name], first_row, search, units)
        for name, units in queries.items()
        if name in searches
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
