"""Shortlists (step 2 of a search on a GPU): a fixed number of candidates for each query, those of the highest coarse scores.

On a GPU, waiting after each chunk to learn how many candidates there are costs more than the work. Here all shapes are known,
and the device is waited for once, to check that the lists were long enough.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.search.chunks import SHORTLIST_GROUP_ROWS
from tl_latentlens.search.error_bounds import CoarseScores

_MIN_LISTED_ROWS, _MAX_LISTED_ROWS = 128, 1024  # A longer list costs more than the search without one.
_MIN_UNSETTLED = 32  # Fewer unsettled queries than this do not tell that shortlists are too short.


@dataclass
class ShortlistStats:
    """The number of queries that had a shortlist of rows, and of those for which it was too short.

    Attributes:
        n_queries: Queries for which a shortlist was made.
        n_unsettled: Those of them for which rows that are not on it may be among the nearest.
    """

    n_queries: int = 0
    n_unsettled: int = 0

    @property
    def is_worthwhile(self) -> bool:
        """True while shortlists settle at least half of the queries."""
        return self.n_unsettled <= max(_MIN_UNSETTLED, self.n_queries / 2)

    def record(self, n_queries: int, n_unsettled: int) -> None:
        """Count more queries."""
        self.n_queries += n_queries
        self.n_unsettled += n_unsettled


@dataclass(frozen=True)
class Shortlist:
    """The rows that are likely to be nearest to each query.

    Attributes:
        row_ids: Row numbers.
        excluded_bound: The most that the similarity of any other row can be. None: there is no other row.
    """

    row_ids: Int[Tensor, "q size"]
    excluded_bound: Float[Tensor, " q"] | None


@dataclass(frozen=True)
class BestRows:
    """The rows of the highest raw scores: no other row has a higher score than the lowest of these.

    Attributes:
        raw: The score of each.
        row_ids: Row numbers.
    """

    raw: Float[Tensor, "q size"]
    row_ids: Int[Tensor, "q size"]

    @staticmethod
    def of(scores: CoarseScores, n_queries: int, size: int) -> "BestRows":
        """At most `size` rows of a chunk.

        The groups of 32 rows with the highest scores are looked into, as many as rows are listed: the best rows are in them.

        Args:
            scores: Raw scores in whole groups, with -inf in padding rows; columns past the queries are padding.
            n_queries: Number of queries.
            size: Rows to list for each.
        """
        raw = scores.raw
        highest = raw.unflatten(0, (-1, SHORTLIST_GROUP_ROWS)).amax(1)[:, :n_queries].T
        groups = highest.topk(min(size, highest.shape[1]), dim=-1, sorted=False).indices
        in_group = torch.arange(SHORTLIST_GROUP_ROWS, device=groups.device)
        rows = (groups[..., None] * SHORTLIST_GROUP_ROWS + in_group).flatten(1)
        best = raw[:, :n_queries].T.gather(1, rows).topk(min(size, scores.n_rows), dim=-1, sorted=False)
        return BestRows(best.values, scores.first_row + rows.gather(1, best.indices))

    def merged(self, other: "BestRows", size: int) -> "BestRows":
        """The best of both, at most `size`."""
        raw, row_ids = torch.cat([self.raw, other.raw], 1), torch.cat([self.row_ids, other.row_ids], 1)
        best = raw.topk(min(size, raw.shape[1]), dim=-1, sorted=False)
        return BestRows(best.values, row_ids.gather(1, best.indices))


def shortlist_size(k: int) -> int:
    """Rows that a shortlist holds for the k nearest; 0 where none is made."""
    size = max(_MIN_LISTED_ROWS, 4 * k)
    return size if size <= _MAX_LISTED_ROWS else 0


def make_shortlist(chunks: Iterable[CoarseScores], n_queries: int, n_rows: int, size: int) -> Shortlist:
    """The rows of the highest scores, at most `size` for each query, without waiting for the device.

    Args:
        chunks: Coarse scores of all rows; scores of floats, whose error bound is the same for all chunks.
        n_queries: Number of queries.
        n_rows: Number of rows.
        size: Rows to list for each query.
    """
    best, bound = None, None
    for scores in chunks:
        chunk_best = BestRows.of(scores, n_queries, size)
        best = chunk_best if best is None else best.merged(chunk_best, size)
        bound = scores.bound
        del scores  # before the next ones are made
    assert best is not None
    assert bound is not None
    if n_rows <= size:
        return Shortlist(best.row_ids, None)
    lowest = best.raw.amin(-1).float()
    return Shortlist(best.row_ids, torch.add(lowest, lowest.abs(), alpha=bound.roundoff) + bound.row_error)
