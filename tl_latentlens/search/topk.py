"""Top-k of pairs of a row and a query (step 4 of a search): ranked by similarity, ties by row number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """Neighbors of each query, nearest first; equal similarities in ascending row order.

    Attributes:
        similarities: Cosines in [-1, 1], float32, [..., k].
        rows: Row numbers, int64, [..., k].
    """

    similarities: Float[Tensor, "... k"]
    rows: Int[Tensor, "... k"]

    @staticmethod
    def none(n_queries: int, k: int, device: torch.device) -> "TopK":
        """No neighbor of any query: -inf and the largest int64 in their places."""
        return TopK(
            torch.full((n_queries, k), -torch.inf, dtype=torch.float32, device=device),
            torch.full((n_queries, k), torch.iinfo(torch.int64).max, device=device),
        )


def rank_pairs(
    similarities: Float[Tensor, " pairs"],
    row_ids: Int[Tensor, " pairs"],
    query_ids: Int[Tensor, " pairs"],
    n_queries: int,
    k: int,
) -> TopK:
    """The k highest pairs of each query, ties in ascending row order; `TopK.none` where a query has fewer."""
    by_row = row_ids.argsort()
    order = by_row[argsort_by_query_then_score(similarities[by_row], query_ids[by_row])]
    counts = torch.bincount(query_ids, minlength=n_queries)
    rank = torch.arange(len(query_ids), device=query_ids.device) - (counts.cumsum(0) - counts)[query_ids[order]]
    is_best = rank < k
    best, rank, top = order[is_best], rank[is_best], TopK.none(n_queries, k, query_ids.device)
    top.similarities[query_ids[best], rank], top.rows[query_ids[best], rank] = similarities[best], row_ids[best]
    return top


def merge_top_k(parts: Sequence[TopK], first_rows: Sequence[int], k: int) -> TopK:
    """The k nearest of the neighbors found in each part; ties go to the earlier part.

    Args:
        parts: Neighbors of the same queries in several searches.
        first_rows: Number of each part's first row, in ascending order.
        k: At least 1; fewer come back where the parts have fewer.
    """
    rows = torch.cat([part.rows + first_row for part, first_row in zip(parts, first_rows, strict=True)], -1)
    best = torch.cat([part.similarities for part in parts], -1).sort(dim=-1, descending=True, stable=True)
    return TopK(best.values[..., :k], rows.gather(-1, best.indices[..., :k]))


def argsort_by_query_then_score(scores: Float[Tensor, " pairs"], query_ids: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """The order that sorts pairs by query, then from the highest score down; equal ones keep their order."""
    # One sort in place of two: the bits of a float sort as an integer; those of floats below zero count backwards.
    bits = (scores + 0.0).view(torch.int32).long()  # adding 0.0 turns -0.0 into 0.0
    return ((query_ids << 33) - torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)).argsort(stable=True)


def kth_best_score(
    scores: Float[Tensor, " pairs"], query_ids: Int[Tensor, " pairs"], k: int, n_queries: int
) -> Float[Tensor, " q"]:
    """The k-th highest score of each query; -inf where it has fewer."""
    counts = torch.bincount(query_ids, minlength=n_queries)
    kth = counts.cumsum(0) - counts + k - 1
    ordered = torch.nn.functional.pad(scores[argsort_by_query_then_score(scores, query_ids)], (0, 1), value=-torch.inf)
    return torch.where(counts >= k, ordered[kth.clamp(max=len(scores))], -torch.inf)
