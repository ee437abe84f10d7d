"""Re-ranking (step 3 of a search): candidates are scored in float32, and those that remain in float64."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.search.scorer import PairScorer
from tl_latentlens.search.topk import TopK, kth_best_score, rank_pairs


def rerank(
    row_ids: Int[Tensor, " pairs"],
    query_ids: Int[Tensor, " pairs"],
    scorer: PairScorer,
    threshold: Float[Tensor, " q"],
    best: TopK,
) -> TopK:
    """The k best of candidates and of the neighbors found before.

    Args:
        row_ids: Row of each candidate.
        query_ids: Query of each candidate.
        scorer: Gives similarities.
        threshold: A similarity that k rows are known to reach, for each query.
        best: The k best rows of each query so far; the candidates are others.
    """
    n_queries, k = best.rows.shape
    scores, error = scorer.score(row_ids, query_ids, torch.float32), scorer.float32_error
    floor = torch.maximum(kth_best_score(scores, query_ids, k, n_queries) - 2 * error, threshold - error)
    may_be_best = scores >= floor[query_ids]
    row_ids, query_ids = row_ids[may_be_best], query_ids[may_be_best]
    exact = scorer.score(row_ids, query_ids, torch.float64)
    is_known = best.rows < scorer.n_rows
    exact = torch.cat([best.similarities[is_known], exact])
    row_ids = torch.cat([best.rows[is_known], row_ids])
    query_ids = torch.cat([is_known.nonzero()[:, 0], query_ids])
    return rank_pairs(exact, row_ids, query_ids, n_queries, k)
