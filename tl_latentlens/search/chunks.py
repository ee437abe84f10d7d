"""Chunks of rows that fit the memory budget, and scratch memory that each chunk uses again."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_ROWS = 16  # A coarse pass compares rows with the threshold in groups of this many.
SHORTLIST_GROUP_ROWS = 32  # A shortlist looks at groups of this many.
_CPU_CHUNK_BYTES = 2**25  # The scores of a chunk, a quarter of this, stay in a CPU's caches.


@dataclass(frozen=True)
class Chunk:
    """Rows `first` to `last` of one search, the last not included. `first` is a multiple of 16."""

    first: int
    last: int

    def __len__(self) -> int:
        """Number of rows."""
        return self.last - self.first

    @property
    def rows(self) -> slice:
        """The rows as an index."""
        return slice(self.first, self.last)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below a number."""
    return -(-number // multiple) * multiple


def rows_per_chunk(bytes_per_row: int, memory_budget: int, device: torch.device) -> int:
    """Rows of a chunk that takes half the memory budget; whole groups, at least one."""
    half = memory_budget // 2
    n_rows = (min(half, _CPU_CHUNK_BYTES) if device.type == "cpu" else half) // bytes_per_row
    return max(GROUP_ROWS, n_rows // SHORTLIST_GROUP_ROWS * SHORTLIST_GROUP_ROWS)


def split_chunk(chunk: Chunk, n_rows: int) -> list[Chunk]:
    """The same rows in chunks of at most `n_rows`."""
    return [Chunk(first, min(first + n_rows, chunk.last)) for first in range(chunk.first, chunk.last, n_rows)]


class ScratchMemory:
    """Memory that is used again for each chunk: on a CPU, fresh memory costs more than the products that fill it."""

    def __init__(self, device: torch.device) -> None:
        """Start with none."""
        self._device = device
        self._buffers: dict[torch.dtype, Tensor] = {}

    def __call__(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] tensor with arbitrary contents; the last one of the same dtype is overwritten."""
        if dtype not in self._buffers or len(self._buffers[dtype]) < rows * columns:
            self._buffers[dtype] = torch.empty(rows * columns, dtype=dtype, device=self._device)
        return self._buffers[dtype][: rows * columns].view(rows, columns)
