"""The way of queries through a search: coarse scores → candidates → re-rank → top k, over several parts at once."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.candidates import HeldPairs
from tl_latentlens.search.chunks import SHORTLIST_GROUP_ROWS, Chunk, ScratchMemory
from tl_latentlens.search.coarse import iter_candidates
from tl_latentlens.search.coarse_pass import SearchPart
from tl_latentlens.search.device import is_asynchronous
from tl_latentlens.search.error_bounds import FLOAT32_TIE_MARGIN
from tl_latentlens.search.rerank import rerank
from tl_latentlens.search.scorer import PairScorer, score_pairs
from tl_latentlens.search.shortlist import Shortlist, make_shortlist, shortlist_size
from tl_latentlens.search.threshold import Threshold
from tl_latentlens.search.topk import TopK

_MAX_QUERIES = (256, 4096)  # Queries that are searched together, on a CPU and on a GPU.
_BYTES_PER_HELD_PAIR = 512  # Candidates are re-ranked when so many bytes of the memory budget for each are used up.


@own_arithmetic()
def top_k_of_parts(parts: Sequence[SearchPart], k: int, *, search_first: int = 0) -> TopK:
    """The k nearest rows among several searches of one width and on one device, ranked together; not clamped to [-1, 1].

    Args:
        parts: The searches, with the same queries as each compares them; of one leading shape.
        k: At least 1; fewer rows come back where there are fewer.
        search_first: The part to search first: the one most likely to hold the nearest rows. It raises the threshold, so the
            other parts give fewer candidates.

    Returns:
        Rows are counted through all parts; ties go to the lower one.

    Raises:
        InvalidInputError: `k` below 1.
    """
    if not isinstance(k, int | np.integer) or k < 1:
        raise InvalidInputError(f"got top_k={k}; expected at least 1, a whole number")
    shape, d = parts[0].queries.shape[:-1], parts[0].rows.d
    flat = [SearchPart(part.coarse_pass, part.queries.reshape(-1, d)) for part in parts]
    k = min(k, sum(len(part.rows) for part in parts))
    if not len(flat[0].queries) or not k:
        similarities = torch.zeros((*shape, k), dtype=torch.float32, device=parts[0].rows.device)
        return TopK(similarities, similarities.long())
    batches = [_search_batch(batch, k, search_first) for batch in split_queries(flat, k)]
    similarities, rows = batches[0].similarities, batches[0].rows
    if len(batches) > 1:
        similarities, rows = torch.cat([best.similarities for best in batches]), torch.cat([best.rows for best in batches])
    return TopK(similarities.reshape(*shape, k), rows.reshape(*shape, k))


def split_queries(parts: Sequence[SearchPart], k: int) -> list[list[SearchPart]]:
    """The parts with as many queries as can be searched together for `k` rows of each."""
    is_ahead, d = is_asynchronous(parts[0].rows.device), parts[0].rows.d
    bytes_per_query = 64 * k + 16 * d
    if is_ahead:
        bytes_per_query += (24 * SHORTLIST_GROUP_ROWS + 56 * len(parts)) * shortlist_size(k)
    n_queries = max(1, min(_MAX_QUERIES[is_ahead], _memory_budget(parts) // bytes_per_query))
    split = zip(*(part.queries.split(n_queries) for part in parts), strict=True)
    return [[SearchPart(part.coarse_pass, batch) for part, batch in zip(parts, batches, strict=True)] for batches in split]


def _memory_budget(parts: Sequence[SearchPart]) -> int:
    return min(part.rows.memory_budget for part in parts)


def _search_batch(parts: Sequence[SearchPart], k: int, search_first: int) -> TopK:
    """The k nearest rows of some queries: from shortlists where all parts can make them, else chunk by chunk."""
    size = shortlist_size(k)
    if not size or not all(part.coarse_pass.can_shortlist for part in parts):
        return _search_chunks(parts, k, search_first)
    best, excluded_bounds = _search_shortlists(parts, k, size)
    query_ids = _find_unsettled(parts, best, excluded_bounds)
    if query_ids is not None:
        unsettled = [SearchPart(part.coarse_pass, part.queries[query_ids]) for part in parts]
        again = _search_chunks(unsettled, k, search_first)
        best.similarities[query_ids], best.rows[query_ids] = again.similarities, again.rows
    return best


def _search_shortlists(parts: Sequence[SearchPart], k: int, size: int) -> tuple[TopK, dict[int, Float[Tensor, " q"]]]:
    """The k nearest rows on shortlists of `size` rows of each part.

    The second value says, for each part with more rows than that, the most that a similarity of its other rows can be.
    """
    similarities, row_ids, excluded_bounds, first_row = [], [], {}, 0
    for place, part in enumerate(parts):
        if len(part.rows):
            shortlist = _make_shortlist(part, size)
            rows, n_queries = shortlist.row_ids, len(part.queries)
            query_ids = torch.arange(n_queries, device=rows.device)[:, None].expand_as(rows)
            scores = score_pairs(part.rows, part.queries, rows.flatten(), query_ids.flatten(), torch.float64)
            similarities.append(scores.view_as(rows))
            row_ids.append(first_row + rows if first_row else rows)
            if shortlist.excluded_bound is not None:
                excluded_bounds[place] = shortlist.excluded_bound
        first_row += len(part.rows)
    by_row = torch.cat(row_ids, 1).sort(-1)
    best = torch.cat(similarities, 1).gather(1, by_row.indices).sort(dim=-1, descending=True, stable=True)
    return TopK(best.values[:, :k].contiguous(), by_row.values.gather(1, best.indices[:, :k])), excluded_bounds


def _make_shortlist(part: SearchPart, size: int) -> Shortlist:
    source = part.coarse_pass.float_source(part.queries, 0, ScratchMemory(part.rows.device))
    n_rows = len(part.rows)
    return make_shortlist(source.scores(Chunk(0, n_rows)), len(part.queries), n_rows, size)


def _find_unsettled(
    parts: Sequence[SearchPart], best: TopK, excluded_bounds: dict[int, Float[Tensor, " q"]]
) -> Int[Tensor, " unsettled"] | None:
    """Queries with a row on no shortlist that may be among their k nearest, or None; each part counts its own such queries."""
    n_queries = len(best.rows)
    n_unsettled = dict.fromkeys(range(len(parts)), 0)
    query_ids = None
    if excluded_bounds:
        bounds = torch.stack(list(excluded_bounds.values()))
        may_be_nearer = best.similarities[:, -1] - FLOAT32_TIE_MARGIN <= bounds
        is_unsettled = may_be_nearer.any(0)
        n_any, *counts = torch.cat([is_unsettled.sum()[None], may_be_nearer.sum(1)]).tolist()  # waits for the device, once
        n_unsettled.update(zip(excluded_bounds, counts, strict=True))
        query_ids = is_unsettled.nonzero()[:, 0] if n_any else None
    for place, part in enumerate(parts):
        part.coarse_pass.stats.record(n_queries, n_unsettled[place])
    return query_ids


def _search_chunks(parts: Sequence[SearchPart], k: int, search_first: int) -> TopK:
    """The k nearest rows of some queries: candidates of one chunk after the other, re-ranked where too many are held."""
    scorer = PairScorer([part.rows for part in parts], [part.queries for part in parts])
    threshold, held, scratch = Threshold(k, scorer), HeldPairs(), ScratchMemory(scorer.device)
    best = TopK.none(scorer.n_queries, k, scorer.device)
    max_pairs = _memory_budget(parts) // _BYTES_PER_HELD_PAIR
    for place in sorted(range(len(parts)), key=lambda place: place != search_first):
        part = parts[place]
        sources = part.coarse_pass.sources(part.queries, scorer.first_rows[place], scratch)
        for chunk, pairs in iter_candidates(sources, Chunk(0, len(part.rows)), threshold):
            held.add(pairs)
            del pairs  # held from here on, until they are re-ranked
            if threshold.see(len(chunk)):
                held.raise_threshold(threshold)
            if held.n_pairs > max_pairs:
                best = _rerank_held(held, threshold, scorer, best)
    return _rerank_held(held, threshold, scorer, best) if held.n_pairs else best


def _rerank_held(held: HeldPairs, threshold: Threshold, scorer: PairScorer, best: TopK) -> TopK:
    """The k best of the held pairs, which are used up, and of those found before; raises the threshold."""
    row_ids, query_ids = held.take(threshold)
    best = rerank(row_ids, query_ids, scorer, threshold.values, best)
    # A later row whose similarity rounds to the same float32 as the k-th still wins if its number is lower.
    threshold.raise_to(best.similarities[:, -1] - FLOAT32_TIE_MARGIN)
    return best
