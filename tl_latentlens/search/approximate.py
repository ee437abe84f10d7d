"""Nearest neighbors that may miss some: FAISS proposes rows, their similarities are exact. For banks past exact search."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError, MissingExtraError
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.chunks import Chunk
from tl_latentlens.search.driver import top_k_of_parts
from tl_latentlens.search.scorer import score_pairs
from tl_latentlens.search.topk import TopK, merge_top_k, rank_pairs
from tl_latentlens.search.vectors import VectorSearch

_ROWS_PER_LIST = 64  # FAISS trains an inverted file with at least 39 rows for each of its lists.
_LISTS_PER_PROBE = 16  # One of this many lists is searched.
_PROPOSED_PER_NEIGHBOR = 10


class ApproximateSearch(VectorSearch):
    """A `VectorSearch` that scores only the rows that a FAISS index proposes, ten times as many as asked for.

    Attributes:
        faiss: The FAISS index, for its own parameters (`faiss.ParameterSpace`).
    """

    @own_arithmetic()
    def __init__(self, *args: Any, factory: str | None = None, **kwargs: Any) -> None:
        """Fill a FAISS index in the computer's memory.

        Args:
            *args: As `VectorSearch` takes them.
            factory: What `faiss.index_factory` makes ("IVF1024,PQ64x4fs", "HNSW32,SQ8"). None: an inverted file of
                4 √n lists with 8 bits a number, of which a sixteenth is searched.
            **kwargs: As `VectorSearch` takes them.

        Raises:
            MissingExtraError: FAISS is not installed.
            InvalidInputError: FAISS does not know such an index, or cannot train it on so few rows.
        """
        super().__init__(*args, **kwargs)
        try:
            import faiss
        except ImportError as error:
            raise MissingExtraError("approximate search needs FAISS: pip install 'tl-latentlens[faiss]'") from error
        n_rows, rows = len(self), self.rows
        n_lists = max(1, min(round(4 * math.sqrt(n_rows)), n_rows // _ROWS_PER_LIST))
        try:
            self.faiss = faiss.index_factory(self.d, factory or f"IVF{n_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
            sample = torch.linspace(0, n_rows - 1, min(n_rows, _ROWS_PER_LIST * n_lists), dtype=torch.float64)
            sample = sample.round().long().to(rows.device)
            self.faiss.train(rows.normalized(sample).cpu().numpy())
            for chunk in rows.chunks(Chunk(0, n_rows), 64 * self.d):
                self.faiss.add(rows.normalized(chunk.rows).cpu().numpy())
        except RuntimeError as error:
            raise InvalidInputError(f"FAISS cannot make an index {factory!r} of {n_rows} rows × {self.d}: {error}") from error
        if factory is None:
            faiss.ParameterSpace().set_index_parameter(self.faiss, "nprobe", max(1, n_lists // _LISTS_PER_PROBE))

    @own_arithmetic()
    def recall(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> float:
        """Share of the k exact neighbors of each query that this search finds, in [0, 1]."""
        approximate, exact = (search(queries, k).rows for search in (self.unclamped_top_k, super().unclamped_top_k))
        return float((exact[..., :, None] == approximate[..., None, :]).any(-1).float().mean())

    @own_arithmetic()
    def unclamped_top_k(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> TopK:
        """The k best of what FAISS proposes, not clamped to [-1, 1]; see `VectorSearch.unclamped_top_k`."""
        units = self.normalize_queries(queries)
        flat, k = units.reshape(-1, self.d), min(k, len(self))
        _, proposed = self.faiss.search(flat.cpu().numpy(), min(_PROPOSED_PER_NEIGHBOR * k, len(self)))
        best = self._rerank(flat, torch.from_numpy(proposed).to(self.rows.device), k)
        # The lists that were searched may hold fewer than k rows.
        short = (best.rows >= len(self)).any(-1).nonzero()[:, 0]
        if len(short):
            exact = top_k_of_parts([self.part(flat[short])], k)
            best.similarities[short], best.rows[short] = exact.similarities, exact.rows
        return TopK(best.similarities.reshape(*units.shape[:-1], k), best.rows.reshape(*units.shape[:-1], k))

    def _rerank(self, queries: Float[Tensor, "q d"], proposed: Int[Tensor, "q proposed"], k: int) -> TopK:
        """The k best of the proposed rows of each query; -1 is no row."""
        query_ids, place = (proposed >= 0).nonzero(as_tuple=True)
        row_ids = proposed[query_ids, place]
        scores = score_pairs(self.rows, queries, row_ids, query_ids, torch.float64)
        return rank_pairs(scores, row_ids, query_ids, len(queries), k)


def approximate_top_k_of_parts(searches: Sequence[VectorSearch], queries: Sequence[Float[Tensor, "... d"]], k: int) -> TopK:
    """The k nearest rows of several searches, like `driver.top_k_of_parts`, from the rows that FAISS proposes in each alone."""
    parts = [search.unclamped_top_k(units, k) for search, units in zip(searches, queries, strict=True)]
    first_rows = np.cumsum([0, *(len(search) for search in searches[:-1])]).tolist()
    return merge_top_k(parts, first_rows, k)
