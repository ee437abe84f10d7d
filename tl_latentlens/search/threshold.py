"""The threshold of a search: a similarity that k rows are known to reach, for each query. It only rises."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.search.chunks import GROUP_ROWS
from tl_latentlens.search.error_bounds import CoarseScores
from tl_latentlens.search.scorer import PairScorer
from tl_latentlens.search.topk import argsort_by_query_then_score

THRESHOLD_UPDATE_GROWTH = 3  # The threshold is raised again when this many times the rows have been seen.


class Threshold:
    """A similarity that k rows are known to reach, for each query.

    Attributes:
        k: Neighbors of each query.
        values: [q]; -inf while fewer than k rows are known.
        lower_bounds: Lower bounds on the similarities of the k best candidates, [q, k].
        n_rows_seen: Rows that the search has looked at.
    """

    def __init__(self, k: int, scorer: PairScorer) -> None:
        """Start with no row known; `scorer` scores the rows that raise the threshold."""
        self.k, self._scorer = k, scorer
        shape, options = (scorer.n_queries, k), {"dtype": torch.float32, "device": scorer.device}
        self.values: Float[Tensor, " q"] = torch.full(shape[:1], -torch.inf, **options)
        self.lower_bounds: Float[Tensor, "q k"] = torch.full(shape, -torch.inf, **options)
        self.n_rows_seen = self._n_rows_at_update = 0

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.values)

    def see(self, n_rows: int) -> bool:
        """Count rows; True where so many were seen since the last time that the threshold should be raised."""
        self.n_rows_seen += n_rows
        is_due = self.n_rows_seen > THRESHOLD_UPDATE_GROWTH * self._n_rows_at_update
        if is_due:
            self._n_rows_at_update = self.n_rows_seen
        return is_due

    def raise_to(self, values: Float[Tensor, " q"]) -> None:
        """Raise the threshold to similarities that k rows reach."""
        self.values = torch.maximum(self.values, values)

    def raise_from_groups(self, scores: CoarseScores) -> None:
        """Score the best row of the k best groups of each query; k rows reach the lowest of these similarities."""
        highest = best_of_groups(scores)[:, : len(self)]
        if len(highest) < self.k:
            return
        width, raw, scale = scores.raw.shape[1], scores.raw, scores.bound.scale
        scaled = highest if scale is None else highest * scale[:, None]
        groups = scaled.T.contiguous().topk(self.k, dim=-1).indices
        query_ids = torch.arange(len(self), device=groups.device)[:, None].expand_as(groups)
        in_group = torch.arange(GROUP_ROWS, device=groups.device)
        cells = (groups[..., None] * GROUP_ROWS + in_group) * width + query_ids[..., None]
        rows = groups * GROUP_ROWS + raw.view(-1)[cells].argmax(-1)
        is_real = rows < scores.n_rows  # others are padding
        row_ids = (scores.first_row + rows).clamp(max=scores.first_row + scores.n_rows - 1)
        bounds = self._scorer.lower_bounds(row_ids.flatten(), query_ids.flatten()).view_as(rows)
        self.raise_to(torch.where(is_real, bounds, -torch.inf).amin(-1))

    def could_raise(self, estimate: Float[Tensor, " pairs"], query_ids: Int[Tensor, " pairs"]) -> Bool[Tensor, " pairs"]:
        """Pairs that would raise the threshold if their estimated similarities were exact."""
        # Fewer than k known rows raise nothing.
        values = torch.where(self.values == -torch.inf, torch.inf, self.values)
        return estimate >= values[query_ids]

    def raise_from_pairs(self, row_ids: Int[Tensor, " pairs"], query_ids: Int[Tensor, " pairs"]) -> None:
        """Score new pairs; the k-th best lower bound of each query, old ones included, is the threshold."""
        n_queries = len(self)
        bounds = torch.cat([self.lower_bounds.flatten(), self._scorer.lower_bounds(row_ids, query_ids)])
        known_ids = torch.arange(n_queries, device=bounds.device).repeat_interleave(self.k)
        ids = torch.cat([known_ids, query_ids])
        counts = torch.bincount(ids, minlength=n_queries)
        places = (counts.cumsum(0) - counts)[:, None] + torch.arange(self.k, device=bounds.device)
        self.lower_bounds = bounds[argsort_by_query_then_score(bounds, ids)[places]]
        self.raise_to(self.lower_bounds[:, -1])


def best_of_groups(scores: CoarseScores) -> Tensor:
    """The best raw score of each group of rows and each column."""
    return scores.raw.unflatten(0, (-1, GROUP_ROWS)).amax(1)
