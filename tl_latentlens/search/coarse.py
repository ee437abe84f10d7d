"""Sources of candidates: they score rows coarsely, chunk by chunk (step 1), and select candidates from the scores (step 2).

A source that finds too many candidates in a chunk gives up on it. `iter_candidates` then asks the next, more precise source
for that chunk. `FloatSource` is the last and never gives up.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.search.backend import gpu_kernels
from tl_latentlens.search.candidates import CandidatePairs, select_fused, select_pairs
from tl_latentlens.search.chunks import SHORTLIST_GROUP_ROWS, Chunk, ScratchMemory, round_up, rows_per_chunk
from tl_latentlens.search.codes import QuantizedRows, QueryCodes
from tl_latentlens.search.device import is_asynchronous
from tl_latentlens.search.error_bounds import (
    CoarseScores,
    ErrorBound,
    product_roundoff,
    transformed_product_error,
    untransformed_product_error,
)
from tl_latentlens.search.rows import StoredRows
from tl_latentlens.search.settings import active_settings
from tl_latentlens.search.threshold import THRESHOLD_UPDATE_GROWTH, Threshold

# Working memory for each (row, query) pair, in bytes: fused pass; coarse pass that keeps its scores; float pass, where every
# pair may become a candidate.
_FUSED_PAIR_BYTES, _SCORE_PAIR_BYTES, _FLOAT_PAIR_BYTES = 4, 16, 64
# If the codes keep more than this share of a chunk's (group, query) cells, the chunk is scored again in float. That costs less
# than re-ranking so many candidates.
_MAX_CANDIDATE_SHARE = 0.125
# The fused pass gives up on a chunk that has more candidates than this share of its cells: at first, and in later chunks.
_MAX_FUSED_SHARES = 0.05, 0.5
_MIN_CODE_COLUMNS = 8  # Products of codes are at least this wide.

ChunkCandidates = tuple[Chunk, list[CandidatePairs] | None]


@runtime_checkable
class CandidateSource(Protocol):
    """A way to find the candidates among the rows of one part of a search."""

    def candidates(self, rows: Chunk, threshold: Threshold) -> Iterator[ChunkCandidates]:
        """Chunks of some rows with the candidates of each; None where a chunk has too many for this source."""
        ...


def iter_candidates(
    sources: Sequence[CandidateSource], rows: Chunk, threshold: Threshold
) -> Iterator[tuple[Chunk, list[CandidatePairs]]]:
    """Chunks of some rows with the candidates of each, from the first source that does not give up on them.

    The threshold may rise while the chunks come.
    """
    source, *more_precise = sources
    for chunk, pairs in source.candidates(rows, threshold):
        if pairs is None:
            yield from iter_candidates(more_precise, chunk, threshold)
        else:
            yield chunk, pairs
            del pairs  # whoever took them may need the memory


class FusedCodeSource:
    """Products of codes that a kernel looks at while it makes them, so that they are never all in memory."""

    def __init__(self, rows: StoredRows, codes: QuantizedRows, queries: QueryCodes, first_row: int) -> None:
        """See `FloatSource`; `codes` are those of the rows."""
        self._rows, self._codes, self._queries, self._first_row = rows, codes, queries, first_row

    def candidates(self, rows: Chunk, threshold: Threshold) -> Iterator[ChunkCandidates]:
        """Growing chunks: each is looked at with the threshold that the ones before have raised."""
        bytes_per_row = _FUSED_PAIR_BYTES * max(len(self._queries), _MIN_CODE_COLUMNS)
        max_rows = rows_per_chunk(bytes_per_row, self._rows.memory_budget, self._rows.device)
        first = rows.first
        while first < rows.last:
            n_rows = min(max(THRESHOLD_UPDATE_GROWTH * first, active_settings().first_chunk_rows), max_rows)
            chunk = Chunk(first, min(first + n_rows, rows.last))
            yield chunk, self._select(chunk, threshold) if threshold.n_rows_seen else None
            first = chunk.last

    def _select(self, chunk: Chunk, threshold: Threshold) -> list[CandidatePairs] | None:
        bound, select = self._codes.error_bound(self._queries, chunk), partial(self._codes.pairs_above, self._queries, chunk)
        max_share = _MAX_FUSED_SHARES[chunk.first > 0]
        return select_fused(bound, select, self._first_row + chunk.first, threshold, max_share=max_share)


class CodeSource:
    """Products of codes, all scores of a chunk in memory."""

    def __init__(
        self,
        rows: StoredRows,
        codes: QuantizedRows,
        queries: QueryCodes,
        first_row: int,
        scratch: ScratchMemory,
    ) -> None:
        """See `FloatSource`; `codes` are those of the rows."""
        self._rows, self._codes, self._queries, self._first_row, self._scratch = rows, codes, queries, first_row, scratch

    def candidates(self, rows: Chunk, threshold: Threshold) -> Iterator[ChunkCandidates]:
        """Chunks of the rows; gives up on those that have many candidates."""
        groups_per_step = _groups_per_step(self._rows)
        for chunk in self._rows.chunks(rows, _SCORE_PAIR_BYTES * max(len(self._queries), _MIN_CODE_COLUMNS)):
            bound = self._codes.error_bound(self._queries, chunk)
            raw = self._codes.raw_scores(self._queries, chunk, self._scratch)
            scores = CoarseScores(self._first_row + chunk.first, len(chunk), raw, bound)
            yield chunk, select_pairs(scores, threshold, max_share=_MAX_CANDIDATE_SHARE, groups_per_step=groups_per_step)


class FloatSource:
    """Products of the stored rows in half precision or float32."""

    def __init__(
        self,
        rows: StoredRows,
        coarse_dtype: torch.dtype,
        queries: Float[Tensor, "q d"],
        first_row: int,
        scratch: ScratchMemory,
    ) -> None:
        """Keep what is to be multiplied.

        Args:
            rows: Rows of one part of the search.
            coarse_dtype: What rows and queries are multiplied in.
            queries: Unit vectors, float32.
            first_row: Number of the part's first row, counted through all parts.
            scratch: Memory for the rows in `coarse_dtype`.
        """
        self._rows, self._coarse_dtype, self._queries = rows, coarse_dtype, queries
        self._first_row, self._scratch = first_row, scratch

    @cached_property
    def _transposed_queries(self) -> Float[Tensor, "q d"]:
        return self._rows.geometry.affine.transposed(self._queries)

    @cached_property
    def _multiplied_queries(self) -> Float[Tensor, "q d"]:
        queries = self._transposed_queries
        # A query with mean 0 does not see the rows' means; weights and removed directions gave queries a mean again.
        return queries - queries.mean(-1, keepdim=True) if self._rows.geometry.removes_own_mean else queries

    @property
    def _products_are_scores(self) -> bool:
        """True where rows need no scale, or where the error bound covers it: a GPU then passes over its products once."""
        scales = self._rows.scales
        return scales.row is None or (scales.max_deviation is not None and is_asynchronous(self._rows.device))

    @cached_property
    def _no_residual(self) -> Float[Tensor, " 1"]:
        return self._queries.new_zeros(1)  # A query that is not rounded has no residual.

    def candidates(self, rows: Chunk, threshold: Threshold) -> Iterator[ChunkCandidates]:
        """Chunks of the rows with their candidates, however many there are."""
        groups_per_step = _groups_per_step(self._rows)
        for chunk, vectors in self._load(rows, _FLOAT_PAIR_BYTES):
            yield chunk, select_pairs(self._score(chunk, vectors), threshold, groups_per_step=groups_per_step)

    def scores(self, rows: Chunk) -> Iterator[CoarseScores]:
        """Scores of some rows, chunk by chunk; scores of padding rows are -inf."""
        for chunk, vectors in self._load(rows, _SCORE_PAIR_BYTES):
            yield self._score(chunk, vectors)

    def _load(self, rows: Chunk, pair_bytes: int) -> Iterator[tuple[Chunk, Float[Tensor, "rows d"]]]:
        needs_copy = self._rows.vectors.dtype != self._coarse_dtype or not self._rows.is_on_device
        bytes_per_row = 8 * self._rows.d * needs_copy + pair_bytes * len(self._queries)
        yield from self._rows.on_device(self._rows.chunks(rows, bytes_per_row))

    def _score(self, chunk: Chunk, vectors: Float[Tensor, "rows d"]) -> CoarseScores:
        raw, query_residual_norm = self._multiply(vectors)
        first_row = self._first_row + chunk.first
        if query_residual_norm is not None and self._rows.is_untransformed and self._products_are_scores:
            return self._untransformed_scores(first_row, len(chunk), raw, query_residual_norm)
        return self._transformed_scores(first_row, chunk, raw)

    def _multiply(self, vectors: Float[Tensor, "rows d"]) -> tuple[Float[Tensor, "padded columns"], Float[Tensor, " q"] | None]:
        """Products with the queries, and the length of each query's rounding error, or None.

        Products of padding rows, which make up whole groups, are -inf; padding columns are arbitrary.
        """
        queries, n_padded = self._multiplied_queries, round_up(len(vectors), SHORTLIST_GROUP_ROWS)
        kernels = gpu_kernels() if len(queries) == 1 and vectors.is_cuda else None
        if kernels is not None:
            return kernels.products_with_one_query(vectors, queries, n_padded), self._no_residual
        if vectors.dtype != self._coarse_dtype:
            vectors = self._scratch(len(vectors), self._rows.d, self._coarse_dtype).copy_(vectors)
        rounded = queries.to(self._coarse_dtype)
        residual_norm = None
        if self._coarse_dtype != torch.float32:
            residual_norm = (queries - rounded.float()).norm(dim=-1)
        if vectors.is_cuda and vectors.itemsize == 2:
            rounded = torch.nn.functional.pad(rounded, (0, 0, 0, -len(rounded) % 8))  # other widths are multiplied more slowly
        products = rounded.new_empty((n_padded, len(rounded)))
        products[len(vectors) :] = -torch.inf
        with _full_accumulation():
            torch.mm(vectors, rounded.T, out=products[: len(vectors)])
        return products, residual_norm

    def _untransformed_scores(
        self, first_row: int, n_rows: int, raw: Float[Tensor, "padded columns"], query_residual_norm: Float[Tensor, " q"]
    ) -> CoarseScores:
        """Products with rows as they are stored: they are the scores, up to the rounding of each row's length."""
        rows = self._rows
        error = untransformed_product_error(
            query_residual_norm, rows.d, self._coarse_dtype, rounds_rows=rows.vectors.dtype != self._coarse_dtype
        )
        roundoff = product_roundoff(raw.dtype) + 1.01 * (rows.scales.max_deviation or 0.0)
        bound = ErrorBound(None, error, roundoff=roundoff)
        return CoarseScores(first_row, n_rows, raw.float() if rows.device.type == "cpu" else raw, bound)

    def _transformed_scores(self, first_row: int, chunk: Chunk, raw: Float[Tensor, "padded columns"]) -> CoarseScores:
        """Products, scaled and shifted as rows are: scores of centered, weighted or normalized rows."""
        rows, queries = self._rows, self._transposed_queries
        gain = transformed_product_error(
            rows.d,
            self._coarse_dtype,
            removes_own_mean=rows.geometry.removes_own_mean,
            has_penalty=rows.penalty is not None,
            error_gain=rows.scales.row_error_gain + rows.scales.center_error_gain,
        )
        bound = ErrorBound(None, gain * queries.norm(dim=-1).clamp(min=1))
        raw = raw[:, : len(queries)].float().contiguous()
        real = raw[: len(chunk)]
        if rows.scales.prenorm is not None:
            real *= rows.scales.prenorm[chunk.rows, None].float()
        if rows.geometry.affine.center is not None:
            real -= (queries.double() @ rows.geometry.affine.center).float()
        if rows.scales.row is not None:
            real *= rows.scales.row[chunk.rows, None].float()
        if rows.penalty is not None:
            real -= rows.penalty[chunk.rows, None].float()
        return CoarseScores(first_row, len(chunk), raw, bound)


def _groups_per_step(rows: StoredRows) -> int:
    return max(1, rows.memory_budget // 2**14)


@contextmanager
def _full_accumulation() -> Iterator[None]:
    """Half-precision products on CUDA summed in float32: by default cuBLAS may round partial sums on the way."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction
    flags.allow_fp16_reduced_precision_reduction = flags.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction = before
