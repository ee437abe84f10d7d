"""The memory of one block: its rows gather here, batch by batch and in any order, until it is full."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped


class BlockBuffer:
    """Vectors and norms of one block, for each hook name.

    Attributes:
        vectors: Hook name → vectors in the dtype of the file, [max_rows, d].
        norms: Hook name → norms, float32, [max_rows].
        first_row: The row of the bank that stands first in the block.
        n_rows: Rows of the block. The arrays may be longer.
    """

    vectors: dict[str, Shaped[np.ndarray, "max_rows d"]]
    norms: dict[str, Float[np.ndarray, " max_rows"]]
    first_row: int
    n_rows: int
    _is_missing: dict[str, np.ndarray]
    _n_missing: int
    _is_saved: np.ndarray

    def __init__(self, widths: Mapping[str, int], dtype: np.dtype, max_rows: int) -> None:
        """Allocate the arrays; `start_block` says what they hold.

        Args:
            widths: Hook name → width of its vectors.
            dtype: How the file stores vectors.
            max_rows: Rows of the largest block.
        """
        self.vectors = {name: np.empty((max_rows, width), dtype) for name, width in widths.items()}
        self.norms = {name: np.empty(max_rows, np.float32) for name in widths}
        self.start_block(0, 0)

    def start_block(self, first_row: int, end_row: int) -> None:
        """Hold the rows from `first_row` to `end_row` from now on, none of which is there yet."""
        self.first_row, self.n_rows = first_row, end_row - first_row
        self._is_missing = {name: np.ones(self.n_rows, bool) for name in self.vectors}
        self._n_missing = self.n_rows * len(self.vectors)
        self._is_saved = np.zeros(self.n_rows, bool)

    @property
    def is_full(self) -> bool:
        """True where every row of every hook name is there."""
        return not self._n_missing

    def put(
        self,
        hook_name: str,
        rows: Int[np.ndarray, " n"],
        vectors: Shaped[np.ndarray, "n d"],
        norms: Float[np.ndarray, " n"],
    ) -> None:
        """Put rows in their places; a row that is there already is replaced.

        Args:
            hook_name: Of the vectors.
            rows: Row numbers in the bank, each once.
            vectors: In the dtype of the file.
            norms: Of the activations.
        """
        places = rows - self.first_row
        self.vectors[hook_name][places] = vectors
        self.norms[hook_name][places] = norms
        is_missing = self._is_missing[hook_name]
        self._n_missing -= int(is_missing[places].sum())
        is_missing[places] = False

    def has(self, rows: Int[np.ndarray, " n"]) -> bool:
        """True where all these rows of the bank are there, of every hook name."""
        return bool(self._is_whole()[rows - self.first_row].all())

    def unsaved_runs(self) -> list[tuple[int, int]]:
        """The rows that are there and not marked as saved: first place and end of each run, within the block."""
        return _runs(self._is_whole() & ~self._is_saved)

    def mark_saved(self, runs: list[tuple[int, int]]) -> None:
        """Mark rows as saved."""
        for first, end in runs:
            self._is_saved[first:end] = True

    def saved_runs(self) -> list[tuple[int, int]]:
        """The rows that are marked as saved, as runs."""
        return _runs(self._is_saved)

    def _is_whole(self) -> np.ndarray:
        """True at each row that is there for every hook name."""
        return ~np.logical_or.reduce(list(self._is_missing.values()))


def _runs(is_in: np.ndarray) -> list[tuple[int, int]]:
    """First place and end of each run of True."""
    edges = np.flatnonzero(np.diff(is_in, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
