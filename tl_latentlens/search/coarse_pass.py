"""The coarse pass of a search: which sources of candidates it has, and its quantized codes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.search.backend import best_code_dtypes, byte_code_dtype
from tl_latentlens.search.chunks import Chunk, ScratchMemory
from tl_latentlens.search.coarse import CandidateSource, CodeSource, FloatSource, FusedCodeSource
from tl_latentlens.search.codes import QuantizedRows
from tl_latentlens.search.device import has_room_for, is_asynchronous
from tl_latentlens.search.rows import StoredRows, with_progress
from tl_latentlens.search.shortlist import ShortlistStats
from tl_latentlens.search.tensors import DTYPES

_MIN_QUANTIZED_ROWS = 4096  # Fewer rows than this are not worth codes of their own.
_MEAN_SAMPLE_ROWS = 2**14  # The mean of at most this many rows is subtracted before rows are quantized.


class CoarsePass:
    """Scores the rows of one search in low precision.

    Attributes:
        rows: The rows.
        code_dtypes: Codes to choose from at the first search, the most precise first; none where stored rows are multiplied.
        stats: How well shortlists did.
    """

    rows: StoredRows
    code_dtypes: list[torch.dtype]
    stats: ShortlistStats

    def __init__(self, rows: StoredRows, dtype: str) -> None:
        """Choose; `dtype` is that of `VectorSearch`."""
        self.rows = rows
        self._dtype, self._code_dtypes = dtype, _choose_code_dtypes(rows, dtype)
        self.code_dtypes = self._code_dtypes if rows.geometry.is_cosine else []
        self._codes_only_if_memory_is_free = dtype == "auto"
        self.stats = ShortlistStats()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the codes, which another process makes for its own processor."""
        return {name: value for name, value in vars(self).items() if name != "codes"}

    @cached_property
    def coarse_dtype(self) -> torch.dtype:
        """What stored rows are multiplied in, where there are no codes or they leave too many candidates."""
        return _choose_coarse_dtype(self.rows, self._dtype, bool(self._code_dtypes))

    @property
    def can_shortlist(self) -> bool:
        """True where stored rows are multiplied on a device that runs ahead of the program, and lists were long enough."""
        is_ahead = self.rows.is_on_device and is_asynchronous(self.rows.device)
        return is_ahead and not self.code_dtypes and self.stats.is_worthwhile

    @cached_property
    def codes(self) -> QuantizedRows | None:
        """The quantized rows; made at the first search, from the memory that other searches left. None: no room for them."""
        n_bytes = {dtype: QuantizedRows.n_bytes(len(self.rows), self.rows.d, dtype) for dtype in self.code_dtypes}
        is_optional = self._codes_only_if_memory_is_free
        possible = [dtype for dtype in n_bytes if not is_optional or has_room_for(n_bytes[dtype], self.rows.device)]
        return _quantize(self.rows, possible[0]) if possible else None

    def sources(self, queries: Float[Tensor, "q d"], first_row: int, scratch: ScratchMemory) -> list[CandidateSource]:
        """Sources of candidates, from the cheapest to the most precise, which never gives up.

        Args:
            queries: Unit vectors, as these rows compare them.
            first_row: Number of the first row, counted through all parts of the search.
            scratch: Memory that all sources share.
        """
        sources: list[CandidateSource] = [self.float_source(queries, first_row, scratch)]
        if self.codes is not None:
            query_codes = self.codes.encode_queries(queries)
            sources.insert(0, CodeSource(self.rows, self.codes, query_codes, first_row, scratch))
            if self.codes.supports_fused:
                sources.insert(0, FusedCodeSource(self.rows, self.codes, query_codes, first_row))
        return sources

    def float_source(self, queries: Float[Tensor, "q d"], first_row: int, scratch: ScratchMemory) -> FloatSource:
        """The source that multiplies stored rows; see `sources`."""
        return FloatSource(self.rows, self.coarse_dtype, queries, first_row, scratch)


@dataclass(frozen=True)
class SearchPart:
    """One search among those that are ranked together, and the queries as it compares them.

    Attributes:
        coarse_pass: Of the search, with its rows.
        queries: Unit vectors, float32, any leading shape.
    """

    coarse_pass: CoarsePass
    queries: Float[Tensor, "... d"]

    @property
    def rows(self) -> StoredRows:
        """The rows of the search."""
        return self.coarse_pass.rows


def _choose_code_dtypes(rows: StoredRows, dtype: str) -> list[torch.dtype]:
    """Codes for the coarse pass, the most precise first; none where it multiplies the stored rows."""
    if dtype == "int8":
        return [byte_code_dtype(rows.device, len(rows))]
    if dtype == "auto":
        is_ready = (rows.is_on_device and rows.device.type != "cpu") or len(rows) < _MIN_QUANTIZED_ROWS
        return [] if is_ready else best_code_dtypes(rows.device, len(rows))
    return [torch.bfloat16] * (dtype == "bfloat16" and rows.device.type == "cpu")


def _choose_coarse_dtype(rows: StoredRows, dtype: str, has_codes: bool) -> torch.dtype:
    """The type in which the coarse pass multiplies stored rows, where it has no codes or they leave too many candidates."""
    coarse_dtype, is_scaled = torch.float32, rows.scales.row is not None and rows.scales.max_deviation is None
    if dtype in DTYPES and not has_codes:
        coarse_dtype = DTYPES[dtype]
    elif rows.device.type != "cpu" and rows.vectors.dtype in DTYPES.values() and (rows.is_on_device or not is_scaled):
        # Half precision keeps many candidates among scaled rows. If the rows are not on the device, each candidate is copied
        # to it, so this case stays in float32.
        coarse_dtype = rows.vectors.dtype
    if is_scaled and coarse_dtype == torch.float16:
        coarse_dtype = torch.bfloat16  # rows of any length can leave float16's range
    return coarse_dtype


def _quantize(rows: StoredRows, dtype: torch.dtype) -> QuantizedRows:
    n, d = len(rows), rows.d
    sample = torch.linspace(0, n - 1, min(n, _MEAN_SAMPLE_ROWS), dtype=torch.float64, device=rows.device).round().long()
    total = torch.zeros(d, dtype=torch.float64, device=rows.device)
    for row_ids in sample.split(max(1, rows.memory_budget // (32 * d))):
        total += rows.normalized(row_ids).sum(0, dtype=torch.float64)
    codes = QuantizedRows(n, total / len(sample), dtype)
    for chunk in with_progress(rows.chunks(Chunk(0, n), 64 * d), n, "codes"):
        codes.encode_rows(chunk.first, rows.normalized(chunk.rows))
    return codes
