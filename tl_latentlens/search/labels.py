"""The nearest row of each of the k nearest labels, such as the words of rows: rows of one label count once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.candidates import CandidatePairs
from tl_latentlens.search.chunks import Chunk, ScratchMemory
from tl_latentlens.search.coarse import iter_candidates
from tl_latentlens.search.coarse_pass import SearchPart
from tl_latentlens.search.driver import split_queries
from tl_latentlens.search.error_bounds import FLOAT32_TIE_MARGIN
from tl_latentlens.search.scorer import PairScorer
from tl_latentlens.search.threshold import Threshold
from tl_latentlens.search.topk import TopK, argsort_by_query_then_score

_ROWS_PER_LABEL = 8  # A chunk with more candidates than this many times k for each query is looked at again.
_BYTES_PER_HELD_PAIR = 512  # Candidates are re-ranked when so many bytes of the memory budget for each are used up.


@dataclass(frozen=True)
class LabelQuery:
    """The labels that a search ranks, and what each query leaves out of them.

    Attributes:
        labels: The label of each row, counted through all parts; below 0: none, and such rows are passed over.
        excluded: Labels that each query leaves out, padded with numbers below -1.
        floor: A similarity that k labels of each query are known to reach; -inf where that is not known.
    """

    labels: Int[Tensor, " rows"]
    excluded: Int[Tensor, "q m"]
    floor: Float[Tensor, " q"]


class _Floor(Threshold):
    """A threshold that rows of one chunk do not raise, since rows of one label would raise it together."""

    def __init__(self, k: int, scorer: PairScorer, floor: Float[Tensor, " q"]) -> None:
        """Begin with what is known, so that no chunk is the first."""
        super().__init__(_ROWS_PER_LABEL * k, scorer)
        self.values, self.n_rows_seen = floor, 1

    def raise_from_groups(self, scores: object) -> None:
        """Leave the threshold as it is."""


@own_arithmetic()
def top_k_labels_of_parts(parts: Sequence[SearchPart], k: int, query: LabelQuery) -> TopK:
    """The nearest row of each of the k nearest labels, nearest first; `TopK.none` where a query has fewer labels.

    Args:
        parts: The searches, with the same queries [q, d] as each compares them; at least one query.
        k: Labels of each query.
        query: The labels, and what each query leaves out.

    Returns:
        Rows are counted through all parts; ties go to the lower one. Not clamped to [-1, 1].
    """
    batches, first, found = split_queries(parts, _ROWS_PER_LABEL * k), 0, []
    for batch in batches:
        span = slice(first, first + len(batch[0].queries))
        found.append(_search_batch(batch, k, LabelQuery(query.labels, query.excluded[span], query.floor[span])))
        first = span.stop
    return TopK(torch.cat([best.similarities for best in found]), torch.cat([best.rows for best in found]))


def _search_batch(parts: Sequence[SearchPart], k: int, query: LabelQuery) -> TopK:
    scorer = PairScorer([part.rows for part in parts], [part.queries for part in parts])
    threshold, scratch = _Floor(k, scorer, query.floor), ScratchMemory(scorer.device)
    max_pairs = min(part.rows.memory_budget for part in parts) // _BYTES_PER_HELD_PAIR
    best, held, n_held = TopK.none(scorer.n_queries, k, scorer.device), [], 0
    for place, part in enumerate(parts):
        sources = part.coarse_pass.sources(part.queries, scorer.first_rows[place], scratch)
        for _, pairs in iter_candidates(sources, Chunk(0, len(part.rows)), threshold):
            held += [_with_label(some, query) for some in pairs]
            del pairs
            n_held += len(held[-1]) if held else 0
            if n_held > max_pairs:
                best, held, n_held = _merged(best, held, threshold, scorer, query.labels), [], 0
    return _merged(best, held, threshold, scorer, query.labels)


def _with_label(pairs: CandidatePairs, query: LabelQuery) -> CandidatePairs:
    """The pairs whose row has a label that the query does not leave out."""
    labels = query.labels[pairs.row_ids]
    is_other = (query.excluded[pairs.query_ids] != labels[:, None]).all(-1)
    return pairs.where((labels >= 0) & is_other)


def _merged(
    best: TopK, held: list[CandidatePairs], threshold: Threshold, scorer: PairScorer, labels: Int[Tensor, " rows"]
) -> TopK:
    """The best row of each of the k best labels of the held pairs and of those found before; raises the threshold."""
    if not held:
        return best
    n_queries, k = best.rows.shape
    pairs = CandidatePairs.cat(held)
    pairs = pairs.where(pairs.upper_bound >= threshold.values[pairs.query_ids])
    row_ids, query_ids = pairs.row_ids, pairs.query_ids
    scores, error = scorer.score(row_ids, query_ids, torch.float32), scorer.float32_error
    first, rank, label_best = _best_of_labels(scores, row_ids, query_ids, labels)
    kth = threshold.values.clone()
    is_kth = rank == k - 1
    kth[query_ids[first[is_kth]]] = torch.maximum(kth[query_ids[first[is_kth]]], scores[first[is_kth]])
    may_be_best = scores >= torch.maximum(kth[query_ids], label_best) - 2 * error
    row_ids, query_ids = row_ids[may_be_best], query_ids[may_be_best]
    is_known = best.rows < scorer.n_rows
    exact = torch.cat([best.similarities[is_known], scorer.score(row_ids, query_ids, torch.float64)])
    row_ids = torch.cat([best.rows[is_known], row_ids])
    query_ids = torch.cat([is_known.nonzero()[:, 0], query_ids])
    first, rank, _ = _best_of_labels(exact, row_ids, query_ids, labels)
    is_best = rank < k
    first, rank, top = first[is_best], rank[is_best], TopK.none(n_queries, k, scorer.device)
    top.similarities[query_ids[first], rank], top.rows[query_ids[first], rank] = exact[first], row_ids[first]
    threshold.raise_to(top.similarities[:, -1] - FLOAT32_TIE_MARGIN)
    return top


def _best_of_labels(
    scores: Float[Tensor, " pairs"],
    row_ids: Int[Tensor, " pairs"],
    query_ids: Int[Tensor, " pairs"],
    labels: Int[Tensor, " rows"],
) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"], Float[Tensor, " pairs"]]:
    """The best pair of each query and label, its rank among those of the query, and for each pair the best of its own label.

    Ties go to the lower row.
    """
    by_row = row_ids.argsort()
    order = by_row[argsort_by_query_then_score(scores[by_row], query_ids[by_row])]
    of_pair = labels[row_ids]
    keys = (query_ids * (int(of_pair.amax()) + 1 if len(of_pair) else 1) + of_pair)[order]
    by_key = keys.argsort(stable=True)
    is_new = torch.ones_like(keys, dtype=torch.bool)
    is_new[1:] = keys[by_key][1:] != keys[by_key][:-1]
    is_first = torch.zeros_like(is_new)
    is_first[by_key] = is_new
    first = order[is_first]
    n_labels = torch.bincount(query_ids[first])
    rank = torch.arange(len(first), device=first.device) - (n_labels.cumsum(0) - n_labels)[query_ids[first]]
    label_best = torch.empty_like(scores)
    label_best[order[by_key]] = scores[order[by_key]][is_new][is_new.cumsum(0) - 1]
    return first, rank, label_best
