"""Which rows are the nearest, over several searches at once: candidates, or on a GPU shortlists, scored exactly.

Knows of a search only what it gives: scores with a bound on their error, shortlists, and exact similarities of pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.candidates import Candidates, Scratch, by_query, kth
from tl_latentlens.search.shortlist import WIDE

if TYPE_CHECKING:
    from tl_latentlens.search.vectors import VectorSearch

_ROUNDING = 2.0**-22  # more than a similarity near 1 loses when it is rounded to float32
_QUERIES = (256, 4096)  # searched at once on a CPU, on a GPU
_SHORTLIST, _SHORTLIST_MOST = 128, 1024  # rows that are likely to hold the k nearest of a query; a longer list is not tried


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


@torch.no_grad()
def rank_together(
    parts: Sequence["VectorSearch"], queries: Sequence[Float[Tensor, "... d"]], k: int, *, nearest: int = 0
) -> TopK:
    """The k nearest of the rows of several searches of one width, ranked together; see `VectorSearch.rank`.

    Args:
        parts: On one device.
        queries: Unit vectors, float32 (`unit_queries`), for each part as it compares them; all of one shape.
        k: At least 1.
        nearest: Which part is likely to hold the nearest: what others have left to find is less then.

    Returns:
        Rows are counted through all parts; ties go to the lower one.

    Raises:
        InvalidInputError: `k` below 1.
    """
    if not isinstance(k, int | np.integer) or k < 1:
        raise InvalidInputError(f"got top_k={k}; expected at least 1, a whole number")
    shape, d = queries[0].shape[:-1], parts[0].d
    flat = [one.reshape(-1, d) for one in queries]
    k = min(k, sum(len(part) for part in parts))
    if not len(flat[0]) or not k:
        none = torch.zeros((*shape, k), dtype=torch.float32, device=parts[0].device)
        return TopK(none, none.long())
    a_query = 64 * k + 16 * d + (24 * WIDE + 56 * len(parts)) * _listed(k) * parts[0].works_ahead
    at_once = min(_QUERIES[parts[0].works_ahead], parts[0].memory_budget // a_query)
    split = zip(*(one.split(max(1, at_once)) for one in flat), strict=True)
    found = [_ranked(parts, list(some), k, nearest) for some in split]
    similarities, rows = found[0].similarities, found[0].rows
    if len(found) > 1:
        similarities, rows = torch.cat([one.similarities for one in found]), torch.cat([one.rows for one in found])
    return TopK(similarities.reshape(*shape, k), rows.reshape(*shape, k))


def _ranked(parts: Sequence["VectorSearch"], queries: list[Float[Tensor, "q d"]], k: int, nearest: int) -> TopK:
    """The k nearest rows of some queries: from shortlists where that goes without waiting, and what they cannot settle anew."""
    size = _listed(k)
    if not size or not all(part.can_shortlist for part in parts):
        return _Ranking(parts, queries, k, nearest).best
    found, left = _of_shortlists(parts, queries, k, size)
    if left is None:
        return found
    unsure = found.similarities[:, -1] - _ROUNDING <= left
    n_unsure = int(unsure.sum())  # here the device is waited for
    parts[0].note(len(unsure), n_unsure)
    if n_unsure:
        places = unsure.nonzero()[:, 0]
        again = _Ranking(parts, [asked[places] for asked in queries], k, nearest).best
        found.similarities[places], found.rows[places] = again.similarities, again.rows
    return found


def _listed(k: int) -> int:
    """How many rows a shortlist has for the k nearest; 0 where none is made."""
    size = max(_SHORTLIST, 4 * k)
    return size if size <= _SHORTLIST_MOST else 0


def _of_shortlists(
    parts: Sequence["VectorSearch"], queries: list[Float[Tensor, "q d"]], k: int, size: int
) -> tuple[TopK, Float[Tensor, " q"] | None]:
    """The k nearest rows on the shortlists of some queries, and the most that the similarity of a row on none can be.

    That is None where all rows are on one.
    """
    scores, rows, left, first = [], [], [], 0
    for part, asked in zip(parts, queries, strict=True):
        if len(part):
            some, most = part.shortlist(asked, size)
            of = torch.arange(len(asked), device=part.device)[:, None].expand_as(some)
            scores.append(part.scores(asked, some.flatten(), of.flatten(), torch.float64).view_as(some))
            rows.append(first + some if first else some)
            left += [] if most is None else [most]
        first += len(part)
    by_row = torch.cat(rows, 1).sort(-1)
    best = torch.cat(scores, 1).gather(1, by_row.indices).sort(dim=-1, descending=True, stable=True)
    found = TopK(best.values[:, :k].contiguous(), by_row.values.gather(1, best.indices[:, :k]))
    return found, reduce(torch.maximum, left) if left else None


class _Ranking:
    """A search for the k nearest rows of some queries in several parts.

    Attributes:
        best: The k best of the rows that were looked through.
    """

    def __init__(self, parts: Sequence["VectorSearch"], queries: list[Float[Tensor, "q d"]], k: int, nearest: int) -> None:
        self._parts, self._queries, self._k = parts, queries, k
        *self._firsts, self._n_rows = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        self._error = max(part.float32_error for part in parts)
        device = parts[0].device
        self.best = TopK.none(len(queries[0]), k, device)
        self._found = Candidates(k, len(queries[0]), self._at_least, device)
        most_pairs, scratch = parts[0].memory_budget // 512, Scratch(device)
        for place in sorted(range(len(parts)), key=lambda place: place != nearest):
            for _ in parts[place].gather(self._found, queries[place], self._firsts[place], scratch):
                if self._found.count > most_pairs:
                    self._settle()
        if self._found.count:
            self._settle()

    def _settle(self) -> None:
        """Take the candidates, which are used up, for the best; raises the threshold."""
        rows, of = self._found.take()
        scores, n_queries = self._scores(rows, of, torch.float32), len(self.best.rows)
        bar = torch.maximum(kth(scores, of, self._k, n_queries) - 2 * self._error, self._found.threshold - self._error)
        kept = scores >= bar[of]
        rows, of = rows[kept], of[kept]
        exact = self._scores(rows, of, torch.float64)
        known = self.best.rows < self._n_rows
        exact = torch.cat([self.best.similarities[known], exact])
        rows, of = torch.cat([self.best.rows[known], rows]), torch.cat([known.nonzero()[:, 0], of])
        self.best = rank_pairs(exact, rows, of, n_queries, self._k)
        # Scores are rounded to float32, and a lower row of equal rounded score comes first.
        self._found.raise_to(self.best.similarities[:, -1] - _ROUNDING)

    def _at_least(self, rows: Int[Tensor, " pairs"], of: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        return self._scores(rows, of, torch.float32) - self._error

    def _scores(self, rows: Int[Tensor, " pairs"], of: Int[Tensor, " pairs"], dtype: torch.dtype) -> Float[Tensor, " pairs"]:
        if len(self._parts) == 1:
            return self._parts[0].scores(self._queries[0], rows, of, dtype)
        scores = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        order = rows.argsort()
        ends = torch.searchsorted(rows[order], torch.tensor(self._firsts[1:], device=rows.device)).tolist()
        parts = zip(self._parts, self._queries, self._firsts, order.tensor_split(ends), strict=True)
        for part, queries, first, here in parts:
            if len(here):
                scores[here] = part.scores(queries, rows[here] - first, of[here], dtype)
        return scores


def rank_pairs(
    exact: Float[Tensor, " pairs"], rows: Int[Tensor, " pairs"], of: Int[Tensor, " pairs"], n_queries: int, k: int
) -> TopK:
    """The k highest of each query, ties in ascending row order; `TopK.none` where a query has fewer."""
    by_row = rows.argsort()
    order = by_row[by_query(exact[by_row], of[by_row])]
    counts = torch.bincount(of, minlength=n_queries)
    place = torch.arange(len(of), device=of.device) - (counts.cumsum(0) - counts)[of[order]]
    near = place < k
    at, place, found = order[near], place[near], TopK.none(n_queries, k, of.device)
    found.similarities[of[at], place], found.rows[of[at], place] = exact[at], rows[at]
    return found
