"""Exact similarities of pairs of a row and a query, in float32 or float64."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.search.backend import dot_product_kernels
from tl_latentlens.search.error_bounds import float32_similarity_error
from tl_latentlens.search.rows import StoredRows
from tl_latentlens.search.tensors import DTYPES

_CPU_CACHE_NUMBERS = 2**17  # On a CPU, this many numbers of rows are multiplied at once, so that they stay in its caches.


class PairScorer:
    """Similarities of pairs in several parts of a search, whose rows are counted one part after the other.

    Attributes:
        first_rows: Number of each part's first row.
        n_rows: Rows of all parts.
        n_queries: Number of queries, the same in each part.
        device: Where the pairs are.
        float32_error: Bound on the error of a similarity that is summed in float32.
    """

    def __init__(self, parts: Sequence[StoredRows], queries: Sequence[Float[Tensor, "q d"]]) -> None:
        """Keep the parts; `queries` are unit vectors, for each part as it compares them."""
        self._parts, self._queries = parts, queries
        *self.first_rows, self.n_rows = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        self.n_queries = len(queries[0])
        self.device = parts[0].device
        self.float32_error = max(float32_similarity_error(part.d, part.scales.row_error_gain) for part in parts)

    def lower_bounds(self, row_ids: Int[Tensor, " pairs"], query_ids: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """Lower bounds on the similarities of pairs, within two float32 errors of them."""
        return self.score(row_ids, query_ids, torch.float32) - self.float32_error

    def score(
        self, row_ids: Int[Tensor, " pairs"], query_ids: Int[Tensor, " pairs"], dtype: torch.dtype
    ) -> Float[Tensor, " pairs"]:
        """Similarities of pairs, summed in `dtype` and rounded once to float32."""
        if len(self._parts) == 1:
            return score_pairs(self._parts[0], self._queries[0], row_ids, query_ids, dtype)
        scores = torch.empty(len(row_ids), dtype=torch.float32, device=row_ids.device)
        order = row_ids.argsort()
        ends = torch.searchsorted(row_ids[order], torch.tensor(self.first_rows[1:], device=row_ids.device)).tolist()
        parts = zip(self._parts, self._queries, self.first_rows, order.tensor_split(ends), strict=True)
        for part, queries, first_row, pairs in parts:
            if len(pairs):
                scores[pairs] = score_pairs(part, queries, row_ids[pairs] - first_row, query_ids[pairs], dtype)
        return scores


def score_pairs(
    rows: StoredRows,
    queries: Float[Tensor, "q d"],
    row_ids: Int[Tensor, " pairs"],
    query_ids: Int[Tensor, " pairs"],
    dtype: torch.dtype,
) -> Float[Tensor, " pairs"]:
    """Similarities of pairs in one part, a bounded number at a time; rows that are transformed are summed in float64."""
    dtype = dtype if rows.is_untransformed else torch.float64
    can_use_kernels = rows.geometry.is_identity and rows.is_on_device and rows.vectors.dtype in DTYPES.values()
    kernels = dot_product_kernels(rows.device, len(rows)) if can_use_kernels else None
    if kernels is not None:
        return _scale_and_shift(rows, kernels.dot_products(rows.vectors, queries, row_ids, query_ids, dtype), row_ids).float()
    scores = torch.empty(len(row_ids), dtype=torch.float32, device=rows.device)
    n_cached = _CPU_CACHE_NUMBERS if rows.device.type == "cpu" else 2**62
    step = max(1, min(rows.memory_budget // 32, n_cached) // rows.d)
    for first in range(0, len(row_ids), step):
        pairs = slice(first, first + step)
        # A product and a sum over the same d for each pair: unlike a matrix product, equal rows give equal bits.
        products = rows.transformed(row_ids[pairs], dtype).mul_(queries.index_select(0, query_ids[pairs]))
        scores[pairs] = _scale_and_shift(rows, products.sum(-1), row_ids[pairs])
    return scores


def _scale_and_shift(
    rows: StoredRows, products: Float[Tensor, " pairs"], row_ids: Int[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    scaled = products if rows.scales.row is None else products * rows.scales.row[row_ids]
    return scaled if rows.penalty is None else scaled - rows.penalty[row_ids]
