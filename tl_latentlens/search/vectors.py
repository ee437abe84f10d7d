"""Exact top-k cosine search over vectors; chooses how a search runs and leaves the steps of it to the modules below."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.coarse_pass import CoarsePass, SearchPart
from tl_latentlens.search.device import as_device
from tl_latentlens.search.driver import top_k_of_parts
from tl_latentlens.search.geometry import Affine, RowGeometry
from tl_latentlens.search.queries import normalize_queries
from tl_latentlens.search.rows import StoredRows
from tl_latentlens.search.tensors import DTYPES
from tl_latentlens.search.topk import TopK


class VectorSearch:
    """Exact nearest neighbors by cosine among fixed vectors.

    Attributes:
        rows: The vectors, and how they are compared.
        coarse_pass: How they are scored first.
    """

    rows: StoredRows
    coarse_pass: CoarsePass

    @own_arithmetic()
    def __init__(
        self,
        vectors: Float[Tensor, "n d"] | np.ndarray,
        device: torch.device | str | None = None,
        dtype: str = "auto",
        *,
        unit_length: bool | None = None,
        center: Float[Tensor, " d"] | None = None,
        weight: Float[Tensor, " d"] | None = None,
        removed: Float[Tensor, "m d"] | None = None,
        remove_means: bool = False,
        geometry: RowGeometry | None = None,
        memory_budget: int | None = None,
        is_verified: bool = False,
    ) -> None:
        """Hold `vectors` on `device` in the precision they have; a CPU search reads a memory map in place.

        Vectors that do not fit a GPU's free memory stay where they are. Their int8 codes go to the GPU if those fit. Else the
        rows are copied through it, chunk by chunk, at each search.

        Args:
            vectors: [n, d], a tensor or a memory map; float16, bfloat16 or float32.
            device: None: CUDA where there is one, else the CPU.
            dtype: Precision of the coarse pass; the result is the same for all. "float32", "float16" and "bfloat16" multiply
                the vectors themselves. "int8" makes codes of one byte a number at the first search, as does "bfloat16" on a
                CPU with two bytes. "auto" takes the vectors' own precision on a GPU that holds them. Else it takes bfloat16
                codes (CPUs with AMX) or byte codes (VNNI, AVX2, NVIDIA), if the hardware multiplies them fast and they fit in
                half of the memory that is free then (80 % of a GPU's).
            unit_length: False: each row is divided by its stored length first, so that rounding does not change its rank. True:
                the rows are used as stored. None: False, but rows that are no unit vectors, up to rounding, are used as stored
                before `center`, `weight`, `removed` and `remove_means`; the result of these is divided by its length always.
            center: Subtracted from each row before comparing; the rows stay as they are in memory.
            weight: Each dimension is multiplied by this next; above 0.
            removed: Orthonormal rows; each row's projection on their span is removed last. Queries are not transformed:
                transform them alike before the search.
            remove_means: Subtract each row's own mean over d from it, and each query's, before comparing. A row of which
                nothing remains after this or `center` has no direction, and similarity 0 to all.
            geometry: All of `center`, `weight`, `removed` and `remove_means` in one object, in place of them.
            memory_budget: Bytes of working memory for a search, beside the vectors and their codes. None: 256 MiB, on a GPU a
                sixteenth of its memory.
            is_verified: The vectors are known to be finite. Their lengths are then measured at the first search.

        Raises:
            InvalidInputError: Vectors that are not [n, d] floats, or hold NaN or inf; a device that does not exist.
        """
        if dtype not in ("auto", "int8", *DTYPES):
            raise InvalidInputError(f"got dtype={dtype!r}; expected 'auto' or one of {['int8', *DTYPES]}")
        if geometry is None:
            geometry = RowGeometry(Affine(center, weight, removed), remove_means)
        self.rows = StoredRows(vectors, as_device(device), geometry, unit_length, memory_budget, is_verified=is_verified)
        self.coarse_pass = CoarsePass(self.rows, dtype)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def d(self) -> int:
        """Width of the vectors."""
        return self.rows.d

    @own_arithmetic()
    def top_k(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> TopK:
        """The k nearest rows of each query (all rows, where there are fewer).

        Args:
            queries: Any leading shape; of any length but zero.
            k: At least 1.

        Raises:
            InvalidInputError: A wrong width, `k` below 1, or a query with NaN or inf, or of length zero.
        """
        best = self.unclamped_top_k(queries, k)
        return TopK(best.similarities.clamp(-1, 1), best.rows) if self.rows.geometry.is_cosine else best

    @own_arithmetic()
    def unclamped_top_k(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> TopK:
        """The k nearest rows of each query, like `top_k`, without clamping to [-1, 1].

        Rounded rows can give a similarity slightly above 1; clamping would make two such rows look equal.
        """
        return top_k_of_parts([self.part(self.normalize_queries(queries))], k)

    @own_arithmetic()
    def normalize_queries(self, queries: Float[Tensor, "... d"] | np.ndarray) -> Float[Tensor, "... d"]:
        """Queries as they are compared: float32 unit vectors, without their own means where rows are.

        Raises:
            InvalidInputError: See `top_k`.
        """
        return normalize_queries(queries, self.d, self.rows.device, remove_means=self.rows.geometry.removes_own_mean)

    def part(self, queries: Float[Tensor, "... d"]) -> SearchPart:
        """This search among several that are ranked together (`driver.top_k_of_parts`), with queries as it compares them."""
        return SearchPart(self.coarse_pass, queries)

    @own_arithmetic()
    def normalized_rows(self, row_ids: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Rows as they are compared, of length 1 (0 where nothing is left), and what is subtracted from their similarities."""
        units, penalty = self.rows.normalized(row_ids), self.rows.penalty
        return units, units.new_zeros(len(row_ids)) if penalty is None else penalty[row_ids].float()
