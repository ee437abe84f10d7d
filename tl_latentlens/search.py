"""Exact top-k cosine search over vectors; knows nothing of models or files.

A cheap pass over the rows, chunk by chunk, keeps a few more candidates than asked for; the candidates are then scored in
float64, and the gap between the last neighbor and the last candidate is held against the rounding error of the cheap
pass (|fl(x·y) - x·y| <= n u / (1 - n u) |x||y|, Higham 2002, section 3.1). Queries for which the gap is too small, for
instance among many equal rows, are scanned a second time with a threshold. So the neighbors do not depend on the
device, the dtype of the pass or the chunk size, and ties always go to the lower row.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Rows this near to length 1 are unit vectors rounded to their type, and are used as stored.
_UNIT_TOLERANCE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 1e-5}
_LARGEST_TOLERANCE = max(_UNIT_TOLERANCE.values())
_NOTHING_LEFT = 1e-6  # of a row's length: what is less than that after centring is rounding


@dataclass(frozen=True)
class TopK:
    """Neighbors of each query, nearest first; equal similarities in ascending row order.

    Attributes:
        similarities: Cosines in [-1, 1], float32, [..., k].
        rows: Row numbers, int64, [..., k].
    """

    similarities: Float[Tensor, "... k"]
    rows: Int[Tensor, "... k"]


class VectorSearch:
    """Exact nearest neighbors by cosine among fixed vectors."""

    def __init__(
        self,
        vectors: Float[Tensor, "n d"] | np.ndarray,
        device: torch.device | str | None = None,
        dtype: str = "auto",
        *,
        unit_length: bool | None = None,
        center: Float[Tensor, " d"] | None = None,
        remove_means: bool = False,
        memory_budget: int = 256 * 2**20,
    ) -> None:
        """Hold `vectors` on `device` in the precision they have; a CPU search reads a memory map where it lies.

        Args:
            vectors: [n, d], a tensor or a memory map; float16, bfloat16 or float32.
            device: None: CUDA where there is one, else the CPU.
            dtype: Precision of the first, approximate pass: "float32" ("auto"), "float16" or "bfloat16". The result is the
                same for all.
            unit_length: The rows are unit vectors (up to rounding) and are used as stored; None looks.
            center: Subtract this vector from each row before comparing; the rows stay as they are in memory.
            remove_means: Subtract each row's own mean over d from it, and each query's, before comparing. A row that has
                nothing left by either has no direction, and similarity 0 to all.
            memory_budget: Most bytes of working memory for a search, beside the vectors.

        Raises:
            InvalidInputError: Vectors that are not [n, d] floats, or hold NaN or inf.
        """
        if dtype != "auto" and dtype not in DTYPES:
            raise InvalidInputError(f"got dtype={dtype!r}; expected 'auto' or one of {list(DTYPES)}")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._vectors = as_tensor(vectors).to(device)
        if self._vectors.ndim != 2 or not self._vectors.is_floating_point():
            raise InvalidInputError(f"got vectors of shape {tuple(self._vectors.shape)}; expected [n, d] floating-point")
        self.device = device
        self.memory_budget = memory_budget
        self._pass_dtype = torch.float32 if dtype == "auto" else DTYPES[dtype]
        self._center = None if center is None else center.to(device, torch.float64)
        self._remove_means = remove_means
        self._scale: Float[Tensor, " n"] | None = None
        as_stored = self._center is None and not remove_means
        if not as_stored or unit_length is None or not unit_length:
            tolerance = _UNIT_TOLERANCE.get(self._vectors.dtype, 1e-5)
            spans = [slice(*span) for span in self._spans(1)] or [slice(0, 0)]
            lengths = torch.cat([self._exact_rows(span).norm(dim=-1) for span in spans])
            if not bool(torch.isfinite(lengths).all()):
                row = int(torch.nonzero(~torch.isfinite(lengths))[0])
                raise InvalidInputError(f"vectors hold NaN or inf, first in row {row}; remove such rows before searching")
            if not as_stored or unit_length is False or bool(((lengths - 1).abs() > tolerance).any()):
                stored = lengths if as_stored else torch.cat([self._vectors[span].double().norm(dim=-1) for span in spans])
                least = 0.0 if as_stored else _NOTHING_LEFT * stored
                self._scale = torch.where(lengths > least, 1 / lengths, 0.0)
                self._stretch = float((stored * self._scale).max()) if len(self) else 1.0
        if self._scale is not None and self._pass_dtype == torch.float16:
            self._pass_dtype = torch.bfloat16  # rows of any length can leave float16's range

    def __len__(self) -> int:
        """Number of rows."""
        return self._vectors.shape[0]

    @property
    def d(self) -> int:
        """Width of the vectors."""
        return self._vectors.shape[1]

    def top_k(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> TopK:
        """The k nearest rows of each query (all rows, where there are fewer).

        Args:
            queries: Any leading shape; of any length but zero.
            k: At least 1.

        Raises:
            InvalidInputError: A wrong width, `k` below 1, or a query with NaN or inf, or of length zero.
        """
        found = self.rank(queries, k)
        return TopK(found.similarities.clamp(-1, 1), found.rows)

    @torch.no_grad()
    def rank(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> TopK:
        """As `top_k`, for ranking several searches together: rounding of the rows may take a similarity just past 1."""
        if k < 1:
            raise InvalidInputError(f"got top_k={k}; expected at least 1")
        units = unit_queries(queries, self.d, self.device, remove_means=self._remove_means)
        flat = units.reshape(-1, self.d)
        k = min(k, len(self))
        if not flat.shape[0] or not k:
            shape = (*units.shape[:-1], k)
            none = torch.zeros(shape, dtype=torch.float32, device=self.device)
            return TopK(none, none.long())
        n_candidates = min(len(self), 2 * k + 32)
        a_query = 8 * self.d * n_candidates + 64 * n_candidates + 16 * self.d
        parts = [self._search(part, k, n_candidates) for part in flat.split(max(1, self.memory_budget // (4 * a_query)))]
        similarities = torch.cat([part.similarities for part in parts])
        rows = torch.cat([part.rows for part in parts])
        return TopK(similarities.reshape(*units.shape[:-1], k), rows.reshape(*units.shape[:-1], k))

    def _search(self, queries: Float[Tensor, "q d"], k: int, n_candidates: int) -> TopK:
        best = torch.zeros((len(queries), 0), dtype=torch.float32, device=self.device)
        rows = torch.zeros((len(queries), 0), dtype=torch.int64, device=self.device)
        for first, last in self._spans(len(queries)):
            scores = self._approximate(queries, first, last)
            found = scores.topk(min(n_candidates, last - first), dim=-1)
            best, rows = torch.cat([best, found.values], -1), torch.cat([rows, found.indices + first], -1)
            if best.shape[1] > n_candidates:
                best, at = best.topk(n_candidates, dim=-1)
                rows = rows.gather(-1, at)
        exact = self._exact_scores(queries, rows)
        found = _rank(exact, rows, k)
        if n_candidates < len(self):
            # Every row left out scored at most best.min() in the first pass, so at most that plus the error bound exactly.
            certain = found.similarities[:, -1] - best.min(-1).values > 2 * self._error_bound()
            if not bool(certain.all()):
                doubtful = torch.nonzero(~certain)[:, 0]
                again = self._scan(queries[doubtful], found.similarities[doubtful, -1], k)
                found.similarities[doubtful], found.rows[doubtful] = again.similarities, again.rows
        return found

    def _scan(self, queries: Float[Tensor, "q d"], at_least: Float[Tensor, " q"], k: int) -> TopK:
        """Top-k given that the k-th similarity is `at_least`: score exactly every row that may reach it."""
        best = torch.full((len(queries), k), -torch.inf, dtype=torch.float32, device=self.device)
        rows = torch.full((len(queries), k), len(self), dtype=torch.int64, device=self.device)
        threshold = (at_least - 2 * self._error_bound())[:, None]
        for first, last in self._spans(len(queries)):
            hits = self._approximate(queries, first, last) >= threshold
            reached = torch.nonzero(hits.any(-1))[:, 0].tolist()
            for query in reached:  # a loop over the few doubtful queries, never over rows
                candidates = torch.nonzero(hits[query])[:, 0] + first
                exact = self._exact_scores(queries[query : query + 1], candidates[None])
                merged = _rank(torch.cat([best[query], exact[0]])[None], torch.cat([rows[query], candidates])[None], k)
                best[query], rows[query] = merged.similarities[0], merged.rows[0]
        return TopK(best, rows)

    def _approximate(self, queries: Float[Tensor, "q d"], first: int, last: int) -> Float[Tensor, "q rows"]:
        part = self._vectors[first:last].to(self._pass_dtype)
        with _full_accumulation():
            scores = (queries.to(self._pass_dtype) @ part.T).float()
        if self._center is not None:
            scores -= (queries.double() @ self._center).float()[:, None]
        if self._scale is not None:
            scores *= self._scale[first:last].float()
        return scores

    def _exact_scores(self, queries: Float[Tensor, "q d"], rows: Int[Tensor, "q m"]) -> Float[Tensor, "q m"]:
        """Similarities in float64, rounded once to float32, a bounded number of rows at a time."""
        exact = torch.empty(rows.shape, dtype=torch.float32, device=self.device)
        step = max(1, self.memory_budget // (32 * self.d * len(queries)))
        for start in range(0, rows.shape[1], step):
            at = rows[:, start : start + step]
            # A product and a sum over the same d for each pair: unlike a matrix product, equal rows give equal bits.
            scores = (self._exact_rows(at) * queries[:, None].double()).sum(-1)
            if self._scale is not None:
                scores = scores * self._scale[at]
            exact[:, start : start + step] = scores.float()
        return exact

    def _exact_rows(self, rows: Any) -> Float[Tensor, "... d"]:
        exact = self._vectors[rows].double()
        if self._remove_means:
            exact = exact - exact.mean(-1, keepdim=True)
        return exact if self._center is None else exact - self._center

    def _error_bound(self) -> float:
        """Most that the first pass can differ from the exact similarity."""
        unit_roundoff = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[self._pass_dtype]
        product = 2.0**-24
        if self._pass_dtype == torch.float32:
            # "high" multiplies in TF32 (2^-11) and "medium" in bfloat16, where the hardware has them.
            unit_roundoff = {"highest": 0.0, "high": 2.0**-11}.get(_float32_precision(), 2.0**-8)
        else:
            product += unit_roundoff  # the product is rounded to the same type
        length = 1.0 + _LARGEST_TOLERANCE if self._scale is None else self._stretch
        if self._remove_means:
            product += 2.0**-23  # queries have mean 0 up to rounding: a row's own mean adds next to nothing to its product
        if self._center is not None and self._scale is not None:
            length += float(self._scale.max()) * float(self._center.norm())
        return (2 * unit_roundoff + product + self.d * 2.0**-23) * length

    def _spans(self, n_queries: int) -> list[tuple[int, int]]:
        """Chunks of rows whose scores, and whose copy in the precision of the pass, fit half the memory budget."""
        a_row = 8 * self.d + 12 * n_queries
        step = max(1, self.memory_budget // (2 * a_row))
        return [(first, min(first + step, len(self))) for first in range(0, len(self), step)]


def _float32_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set per backend (fp32_precision), which this getter refuses to sum up
        return "medium"


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


def _rank(similarities: Float[Tensor, "q m"], rows: Int[Tensor, "q m"], k: int) -> TopK:
    """The k highest, ties in ascending row order."""
    by_row = rows.argsort(-1)
    similarities, rows = similarities.gather(-1, by_row), rows.gather(-1, by_row)
    order = similarities.argsort(dim=-1, descending=True, stable=True)[:, :k]
    return TopK(similarities.gather(-1, order), rows.gather(-1, order))


def as_tensor(vectors: Tensor | np.ndarray) -> Tensor:
    """A tensor over the same memory; bfloat16 arrays (ml_dtypes) become torch bfloat16."""
    if isinstance(vectors, Tensor):
        return vectors.detach()
    array = np.asarray(vectors)
    if array.dtype.name == "bfloat16":
        return _from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return _from_numpy(array)


def _from_numpy(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # Nothing here writes to vectors, so a read-only memory map is fine.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def unit_queries(
    queries: Float[Tensor, "... d"] | np.ndarray, d: int, device: torch.device, *, remove_means: bool = False
) -> Float[Tensor, "... d"]:
    """Queries as float32 unit vectors on `device`, each without its own mean over d where asked for.

    Raises:
        InvalidInputError: Another width than `d`, or a query with NaN or inf, or of length zero; the message says where.
    """
    tensor = as_tensor(queries).to(device)
    if tensor.ndim < 1 or tensor.shape[-1] != d:
        raise InvalidInputError(
            f"got queries of shape {tuple(tensor.shape)}; expected a last dimension of {d}, the width of the bank"
        )
    exact = tensor.double()
    lengths = exact.norm(dim=-1, keepdim=True)
    if remove_means:
        exact = exact - exact.mean(-1, keepdim=True)
        left = exact.norm(dim=-1, keepdim=True)
        lengths = torch.where(left > _NOTHING_LEFT * lengths, left, 0 * left)
    bad = ~torch.isfinite(lengths[..., 0]) | (lengths[..., 0] == 0)
    if bool(bad.any()):
        where = tuple(torch.nonzero(bad)[0].tolist())
        kind = "zero" if bool((lengths[..., 0] == 0)[where]) else "NaN or inf"
        raise InvalidInputError(f"{int(bad.sum())} queries cannot be compared: the query at index {where} is {kind}")
    return (exact / lengths).float()
