"""Quantized codes: rows and queries in one or two bytes a number, whose products are coarse scores with a known error.

Rows, less their mean, are bytes with one scale for each group of 16 rows, or bfloat16. A row is
`mean + scale * (code + residual)`, a query `query_scale * (code + residual)`. The product of the two codes, times both
scales, differs from query · (row - mean) by at most

    query_scale |query residual| |row - mean| + query_scale scale |query code| |row residual|

(Cauchy-Schwarz). The lengths are measured, not estimated; those of rows are the largest of a chunk's. Integer products are
exact; bfloat16 ones are summed in float32 and rounded once. uint8 is int8 plus 128, which is subtracted from the products
again; the codes of queries then have fewer levels where the processor has no VNNI.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.search.backend import MAX_AVX2_CODE, byte_kernels, cpu_kernels, onednn_products, pack_for_onednn
from tl_latentlens.search.chunks import GROUP_ROWS, Chunk, ScratchMemory, round_up
from tl_latentlens.search.error_bounds import BFLOAT16_PRODUCT_ROUNDOFF, CODE_FLOAT32_ERROR, ErrorBound, RawPairs

_MAX_BYTE = 127
_UNSIGNED_SHIFT = 128
_WIDTH_MULTIPLE = 8  # CUDA multiplies matrices whose sides are multiples of this.


@dataclass(frozen=True)
class QueryCodes:
    """Queries as codes: `query = scale * (code + residual)`.

    Attributes:
        packed: The codes, as they are multiplied.
        width: Columns of their products with a row; those past the queries are padding.
        bias: Added to the products.
        scale: Scale of each query.
        code_norm: Length of each code.
        residual_norm: Length of each residual.
        offset: Product of each query with the mean of the rows.
    """

    packed: Tensor
    width: int
    bias: Float[Tensor, " width"]
    scale: Float[Tensor, " q"]
    code_norm: Float[Tensor, " q"]
    residual_norm: Float[Tensor, " q"]
    offset: Float[Tensor, " q"]

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.scale)


class QuantizedRows:
    """The rows of a search as codes.

    Attributes:
        mean: Subtracted from every row, float32, [d].
        supports_fused: True where a kernel selects scores while it makes them, so that they need not all be in memory.
    """

    def __init__(self, n: int, mean: Float[Tensor, " d"], dtype: torch.dtype) -> None:
        """Make room; `encode_rows` fills it.

        Args:
            n: Number of rows.
            mean: Subtracted from every row; any vector is right, the rows' mean is best.
            dtype: torch.int8, torch.uint8 or torch.bfloat16.
        """
        device, n_padded = mean.device, round_up(n, GROUP_ROWS)
        self.mean = mean.float()
        shape = (n_padded + GROUP_ROWS, round_up(len(mean), _WIDTH_MULTIPLE))
        self._codes = torch.zeros(shape, dtype=dtype, device=device)
        self._is_unsigned = dtype == torch.uint8
        self._kernels = byte_kernels(device, n) if self._is_unsigned else None
        self.supports_fused = self._kernels is not None
        self._max_query_code = _MAX_BYTE
        if self._is_unsigned:
            self._max_query_code = MAX_AVX2_CODE if self._kernels is None else self._kernels.MAX_QUERY_CODE
        groups = n_padded // GROUP_ROWS
        scale, self._code_norm, self._residual_norm = (
            torch.empty(groups, dtype=torch.float32, device=device) for _ in range(3)
        )
        self._scale = None if dtype == torch.bfloat16 else scale

    @staticmethod
    def n_bytes(n: int, d: int, dtype: torch.dtype) -> int:
        """Memory that the codes of n rows take."""
        return round_up(n, GROUP_ROWS) * (dtype.itemsize * round_up(d, _WIDTH_MULTIPLE) + 1)

    def encode_rows(self, first: int, rows: Float[Tensor, "rows d"]) -> None:
        """Encode rows.

        Args:
            first: Row number of the first, a multiple of 16.
            rows: As they are compared, of length 1 or 0, float32.
        """
        groups = slice(first // GROUP_ROWS, round_up(first + len(rows), GROUP_ROWS) // GROUP_ROWS)
        kernels = cpu_kernels(rows.device, len(self._codes))
        if kernels is not None and self._scale is not None and len(rows) % GROUP_ROWS == 0:
            codes = self._codes[first : first + len(rows)].unflatten(0, (-1, GROUP_ROWS))
            measures = (self._scale[groups], self._code_norm[groups], self._residual_norm[groups])
            kernels.encode_rows(rows.unflatten(0, (-1, GROUP_ROWS)), self.mean, codes, *measures)
            return
        padding = (0, 0, 0, -len(rows) % GROUP_ROWS)
        grouped = torch.nn.functional.pad(rows - self.mean, padding).unflatten(0, (-1, GROUP_ROWS))
        scaled = grouped
        if self._scale is not None:
            self._scale[groups] = grouped.abs().amax((1, 2)).clamp(min=1e-30) / _MAX_BYTE
            scaled = grouped / self._scale[groups, None, None]
        shift = _UNSIGNED_SHIFT * self._is_unsigned
        codes = self._round(scaled) + shift
        self._codes[first : first + codes[..., 0].numel(), : len(self.mean)] = codes.flatten(0, 1)
        self._code_norm[groups] = grouped.norm(dim=-1).amax(1)
        self._residual_norm[groups] = (scaled - codes + shift).norm(dim=-1).amax(1)

    def encode_queries(self, queries: Float[Tensor, "q d"]) -> QueryCodes:
        """Unit queries as codes."""
        offset = (queries.double() @ self.mean.double()).float()
        scale = queries.new_ones(len(queries))
        if self._scale is not None:
            scale = queries.abs().amax(-1) / self._max_query_code
        scaled = queries / scale[:, None]
        codes = self._round(scaled)
        n_more = 0 if self._is_unsigned else -len(codes) % _WIDTH_MULTIPLE
        padded = torch.nn.functional.pad(codes, (0, self._codes.shape[1] - codes.shape[1], 0, n_more))
        bias = -_UNSIGNED_SHIFT * padded.sum(-1) * self._is_unsigned
        if self._kernels is not None:
            packed = self._kernels.pack_queries(padded)
            width = packed[:, 0].numel()
        else:
            padded, width = padded.to(torch.int8 if self._is_unsigned else self._codes.dtype), len(padded)
            packed = pack_for_onednn(padded) if self._is_unsigned else padded.T
        return QueryCodes(packed, width, bias, scale, codes.norm(dim=-1), (scaled - codes).norm(dim=-1), offset)

    def _round(self, scaled: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return scaled.bfloat16().float() if self._scale is None else scaled.round()

    def raw_scores(
        self, queries: QueryCodes, chunk: Chunk, scratch: ScratchMemory
    ) -> Int[Tensor, "rows columns"] | Float[Tensor, "rows columns"]:
        """Products of the codes of a chunk of rows with those of queries, in scratch memory."""
        n_padded = round_up(len(chunk), GROUP_ROWS)
        codes = self._codes[chunk.first : chunk.first + max(n_padded, 2 * GROUP_ROWS)]  # CUDA multiplies more than 16 rows
        if self._scale is None:
            raw = torch.mm(codes, queries.packed, out=scratch(len(codes), queries.width, codes.dtype))
        elif self._kernels is not None:
            raw = scratch(len(codes), queries.width, torch.int32)
            self._kernels.code_products(codes, queries.packed, raw)
        elif self._is_unsigned:
            raw = onednn_products(codes, queries.packed, queries.bias)
        else:
            raw = scratch(len(codes), queries.width, torch.int32)
            torch._int_mm(codes, queries.packed, out=raw)  # pyright: ignore[reportPrivateImportUsage]
        return raw[:n_padded]

    def pairs_above(
        self, queries: QueryCodes, chunk: Chunk, min_raw: Float[Tensor, "groups q"], max_pairs: int
    ) -> RawPairs | None:
        """Rows of a chunk, queries and raw scores that reach the least raw score, where `supports_fused`.

        None where there are more than `max_pairs`.
        """
        assert self._kernels is not None
        codes = self._codes[chunk.first : chunk.first + round_up(len(chunk), GROUP_ROWS)]
        return self._kernels.fused_pairs_above(codes, queries.packed, min_raw, len(chunk), max_pairs)

    def error_bound(self, queries: QueryCodes, chunk: Chunk) -> ErrorBound:
        """The bounds that the raw scores of a chunk of rows put on similarities."""
        groups = slice(chunk.first // GROUP_ROWS, round_up(chunk.last, GROUP_ROWS) // GROUP_ROWS)
        code_norm, width = self._code_norm[groups].max(), self._codes.shape[1]
        row_error = self._residual_norm[groups].max() * queries.code_norm
        query_error = code_norm * queries.residual_norm + CODE_FLOAT32_ERROR / queries.scale
        if self._scale is None:
            row_error = row_error + code_norm * queries.code_norm * width * 2.0**-23
            return ErrorBound(None, row_error, query_error, queries.scale, queries.offset, roundoff=BFLOAT16_PRODUCT_ROUNDOFF)
        if self._is_unsigned and self._kernels is None:
            row_error = row_error + width * 255 * MAX_AVX2_CODE * 2.0**-22  # sums past 2^24 are rounded to float32
        return ErrorBound(self._scale[groups], row_error, query_error, queries.scale, queries.offset)
