"""Exact top-k cosine search over vectors; knows nothing of models or files.

A cheap pass over the rows, chunk by chunk, in int8, half precision or float32, leaves out every row that the error of the
pass (`preselect`; for floats |fl(x·y) - x·y| <= n u / (1 - n u) |x||y|, Higham 2002, section 3.1) cannot bring among the
k nearest; the few that remain are scored in float32 and then in float64. So the neighbors do not depend on the device,
the dtype of the pass or the chunk size, and ties always go to the lower row.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.candidates import GROUP, LATER, Candidates, Scores, Scratch, compiled_loops
from tl_latentlens.search.codes import Codes, byte_codes, fast_codes
from tl_latentlens.search.device import as_device, free_memory
from tl_latentlens.search.geometry import Affine, hubness
from tl_latentlens.search.ranking import TopK, rank_together
from tl_latentlens.search.shortlist import WIDE, Shortlist

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Rows this near to length 1 are unit vectors rounded to their type, and are used as stored.
_UNIT_TOLERANCE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 1e-5}
_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
_LARGEST_TOLERANCE = max(_UNIT_TOLERANCE.values())
_NOTHING_LEFT = 1e-6  # of a row's length: what is less than that after centring is rounding
_FEW_ROWS = 4096  # not worth codes of their own
_TOO_MANY = 0.125  # of a chunk's groups left over by the codes: a float32 pass over the chunk costs less than scoring them
_TOO_MANY_SEEN = 0.05, 0.5  # rows left over for each group and query, where scores are seen as they are made: at first, later
_CPU_CHUNK = 2**25  # working memory of a chunk whose scores, a quarter of it, stay in a CPU's caches
_CPU_PAIRS = 2**17  # numbers of rows to multiply with queries at once: so they stay there too
_FIRST = 2**14  # rows that are looked at first, to know what similarities are near
_SAMPLE = 2**14  # rows whose mean is taken away before rounding to codes
_SEEN, _SCORE, _CANDIDATE = 4, 16, 64  # most bytes for a score that is seen as it is made, that is kept, that makes a candidate
_SMALL = 2**16  # numbers that are divided by their length before a GPU has begun
_AT_ONCE = frozenset({"cpu"})  # devices whose operators are done when they return
_ENOUGH_TO_TELL = 32  # queries for which a shortlist did not do


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
        weight: Float[Tensor, " d"] | None = None,
        removed: Float[Tensor, "m d"] | None = None,
        remove_means: bool = False,
        memory_budget: int | None = None,
    ) -> None:
        """Hold `vectors` on `device` in the precision they have; a CPU search reads a memory map where it lies.

        Vectors that do not fit a GPU's free memory stay where they are: their int8 codes go to the GPU if those fit, and
        else the rows are copied through it chunk by chunk at each search.

        Args:
            vectors: [n, d], a tensor or a memory map; float16, bfloat16 or float32.
            device: None: CUDA where there is one, else the CPU.
            dtype: Precision of the first, approximate pass: "float32", "float16", "bfloat16" or "int8", for which codes of
                one byte a number, for "bfloat16" on a CPU of two, are made at the first search. "auto": on a GPU that holds
                the vectors, their own precision; else bfloat16 (CPUs with AMX) or int8 (VNNI, AVX2, NVIDIA) where the hardware
                multiplies it fast and half of the memory that is free then (80 % of a GPU's) holds the codes. The result is
                the same for all.
            unit_length: The rows are unit vectors (up to rounding) and are used as stored; None looks. False: each is divided
                by its length first, also before `center` is subtracted.
            center: Subtract this vector from each row before comparing; the rows stay as they are in memory.
            weight: Then multiply it by this, dimension by dimension; above 0.
            removed: Then take away what lies in the span of these orthonormal rows. Queries are compared as they are given:
                transform them alike (`geometry.Affine`).
            remove_means: Subtract each row's own mean over d from it, and each query's, before comparing. A row that has
                nothing left by either has no direction, and similarity 0 to all.
            memory_budget: Most bytes of working memory for a search, beside the vectors and their codes. None: 256 MiB, on
                a GPU a sixteenth of its memory.

        Raises:
            InvalidInputError: Vectors that are not [n, d] floats, or hold NaN or inf; a device that is not there.
        """
        if dtype not in ("auto", "int8", *DTYPES):
            raise InvalidInputError(f"got dtype={dtype!r}; expected 'auto' or one of {['int8', *DTYPES]}")
        device = as_device(device)
        self._vectors = as_tensor(vectors)
        if self._vectors.ndim != 2 or not self._vectors.is_floating_point():
            raise InvalidInputError(f"got vectors of shape {tuple(self._vectors.shape)}; expected [n, d] floating-point")
        self.memory_budget = _working_memory(device) if memory_budget is None else memory_budget
        if self._vectors.device != device and _fits(self._vectors.nbytes, device):
            self._vectors = self._vectors.to(device)
        self.device = self._vectors.device if self._vectors.device.type == device.type else device
        parts = (None if part is None else part.to(self.device, torch.float64) for part in (center, weight, removed))
        self._affine = Affine(*parts)
        self._offset: Float[Tensor, " n"] | None = None
        self._remove_means = remove_means
        self._none, self._one = (torch.full((1,), value, dtype=torch.float32, device=self.device) for value in (0.0, 1.0))
        self._scale: Float[Tensor, " n"] | None = None
        self._stretch, self._center_stretch = 1.0 + _LARGEST_TOLERANCE, 0.0  # lengths of a stored row and the center, scaled
        self._to_unit: Float[Tensor, " n"] | None = None
        self._listed = self._unsure = 0  # queries that a shortlist was made for, and those that it did not do for
        self._as_stored = self._affine.changes_nothing and not remove_means
        if not self._as_stored or unit_length is None or not unit_length:
            tolerance = _UNIT_TOLERANCE.get(self._vectors.dtype, 1e-5)
            spans = [slice(*span) for span in self._spans(0, len(self), 32 * self.d)] or [slice(0, 0)]
            if unit_length is False and not self._as_stored:
                norms = self._norms(spans)
                self._to_unit = torch.where(norms > 0, 1 / norms, 0.0)
            lengths = torch.cat([self._compared(span, torch.float64).norm(dim=-1) for span in spans])
            if self._to_unit is not None:
                lengths = torch.where(self._to_unit > 0, lengths, 0.0)  # zeros have no direction, centred or not
            if not bool(torch.isfinite(lengths).all()):
                row = int(torch.nonzero(~torch.isfinite(lengths))[0])
                raise InvalidInputError(f"vectors hold NaN or inf, first in row {row}; remove such rows before searching")
            if not self._as_stored or unit_length is False or bool(((lengths - 1).abs() > tolerance).any()):
                stored = lengths
                least = torch.zeros_like(lengths)
                if not self._as_stored:
                    stored = self._norms(spans) * (1 if self._to_unit is None else self._to_unit)
                    largest = 1.0 if self._affine.weight is None else self._affine.weight.max()
                    least = _NOTHING_LEFT * largest * stored
                self._scale = torch.where(lengths > least, 1 / lengths, 0.0)
                self._stretch = float((stored * self._scale).max()) if len(self) else 1.0
                if len(self) and self._affine.center is not None:
                    self._center_stretch = float(self._scale.max()) * float(self._affine.center.norm())
        self._kinds, self._if_they_fit = self._kinds_of_codes(dtype), dtype == "auto"
        self._float_pass = torch.float32
        if dtype in DTYPES and not self._kinds:
            self._float_pass = DTYPES[dtype]
        elif self.device.type != "cpu" and self._vectors.dtype in DTYPES.values() and (self._held or self._scale is None):
            # Of scaled rows it leaves many over, and those that lie elsewhere would have to be copied one by one.
            self._float_pass = self._vectors.dtype
        if self._scale is not None and self._float_pass == torch.float16:
            self._float_pass = torch.bfloat16  # rows of any length can leave float16's range

    def _norms(self, spans: list[slice]) -> Float[Tensor, " n"]:
        return torch.cat([self._vectors[span].to(self.device).double().norm(dim=-1) for span in spans])

    @property
    def _held(self) -> bool:
        """True where the vectors lie on the device: on a CPU always, on a GPU if they fit."""
        return self._vectors.device == self.device

    def _kinds_of_codes(self, dtype: str) -> list[torch.dtype]:
        """Codes for the first pass, the most precise first; none where it multiplies the vectors themselves."""
        if dtype == "int8":
            return [byte_codes(self.device, len(self))]
        if dtype == "auto":
            as_they_are = (self._held and self.device.type != "cpu") or len(self) < _FEW_ROWS
            return [] if as_they_are else fast_codes(self.device, len(self))
        return [torch.bfloat16] * (dtype == "bfloat16" and self.device.type == "cpu")

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
        return TopK(found.similarities.clamp(-1, 1) if self._offset is None else found.similarities, found.rows)

    @torch.no_grad()
    def rank(self, queries: Float[Tensor, "... d"] | np.ndarray, k: int) -> TopK:
        """As `top_k`, but rounding of the rows may take a similarity just past 1, and only by that two may differ."""
        return rank_together([self], [self.units(queries)], k)

    def units(self, queries: Float[Tensor, "... d"] | np.ndarray) -> Float[Tensor, "... d"]:
        """Queries as they are compared: `unit_queries`, without their own means where that is so."""
        return unit_queries(queries, self.d, self.device, remove_means=self._remove_means)

    def gather(self, found: Candidates, queries: Float[Tensor, "q d"], first: int, scratch: Scratch) -> Iterator[None]:
        """Look through the rows, which are `found` by numbers from `first` on; a chunk at each step."""
        piece, n = max(1, self.memory_budget // 2**14), len(queries)

        def by_floats(start: int, end: int) -> Iterator[None]:
            for at, until, part in self._parts(start, end, _CANDIDATE * n):
                found.add(self._float_scores(queries, part, at, until, scratch), first + at, first + until, piece=piece)
                yield

        if (codes := self._codes) is None:
            yield from by_floats(0, len(self))
            return
        encoded = codes.encode(queries)

        def by_codes(start: int, end: int) -> Iterator[None]:
            for at, until in self._spans(start, end, _SCORE * max(n, 8)):
                scores = codes.scores(encoded, at, until, scratch)
                if found.add(scores, first + at, first + until, most=_TOO_MANY, piece=piece):
                    yield
                else:
                    yield from by_floats(at, until)

        def as_made(start: int, end: int) -> bool:
            most = _TOO_MANY_SEEN[start > 0]
            reaching, bounds = partial(codes.reaching, encoded, start, end), codes.bounds(encoded, start, end)
            return found.add_as_made(bounds, reaching, first + start, first + end, most=most)

        start, most = 0, self._step(_SEEN * max(n, 8))
        while start < len(self):
            step = max(LATER * start, _FIRST)
            end = min(start + min(step, most), len(self)) if codes.seen_as_made else len(self)
            if codes.seen_as_made and found.n_seen and as_made(start, end):
                yield
            else:
                yield from by_codes(start, end)
            start = end

    def scores(
        self, queries: Float[Tensor, "q d"], rows: Int[Tensor, " pairs"], of: Int[Tensor, " pairs"], dtype: torch.dtype
    ) -> Float[Tensor, " pairs"]:
        """Similarities of pairs, summed in a given precision and rounded once to float32, a bounded number at a time."""
        if not self._as_stored or self._offset is not None:
            dtype = torch.float64
        fused = self._fused()
        if fused is not None:
            dots = fused.dots(self._vectors, queries, rows, of, dtype)
            dots = dots if self._scale is None else dots * self._scale[rows]
            return (dots if self._offset is None else dots - self._offset[rows]).float()
        scores = torch.empty(len(rows), dtype=torch.float32, device=self.device)
        cached = _CPU_PAIRS if self.device.type == "cpu" else 2**62
        step = max(1, min(self.memory_budget // 32, cached) // self.d)
        for at in range(0, len(rows), step):
            pairs = slice(at, at + step)
            # A product and a sum over the same d for each pair: unlike a matrix product, equal rows give equal bits.
            products = self._compared(rows[pairs], dtype).mul_(queries.index_select(0, of[pairs]))
            part = products.sum(-1)
            part = part if self._scale is None else part * self._scale[rows[pairs]]
            scores[pairs] = part if self._offset is None else part - self._offset[rows[pairs]]
        return scores

    def _fused(self) -> Any:
        """The module whose `dots` reads stored rows once; None where rows are compared otherwise, or torch must do it."""
        if not self._as_stored or self._vectors.dtype not in DTYPES.values() or not self._held:
            return None
        return compiled_loops(self.device, len(self)) if self.device.type == "cpu" else _kernels()

    @property
    def works_ahead(self) -> bool:
        """True on a device that works while the program goes on."""
        return self.device.type not in _AT_ONCE

    @property
    def can_shortlist(self) -> bool:
        """True where the rows lie as floats on a device that works ahead, and lists were enough so far."""
        enough = self._unsure <= max(_ENOUGH_TO_TELL, self._listed / 2)
        return self._held and self.works_ahead and not self._kinds and enough

    def shortlist(self, queries: Float[Tensor, "q d"], size: int) -> tuple[Int[Tensor, "q listed"], Float[Tensor, " q"] | None]:
        """The rows that are likely to be nearest, at most `size` of each query, without waiting for the device.

        Returns:
            Row numbers, and the most that the similarity of any other row can be; None where there is none.
        """
        scratch, found, error, rounding = Scratch(self.device), None, self._none, 0.0
        for first, last, part in self._parts(0, len(self), _SCORE * len(queries)):
            scores = self._float_scores(queries, part, first, last, scratch)
            here = Shortlist.of(scores.raw, len(queries), first, last, size)
            found = here if found is None else found.merged(here, size)
            error, rounding = scores.coded, scores.rounding  # the same for all chunks, and all that scores of floats can be off
            del scores  # before the next ones are made
        assert found is not None
        if len(self) <= size:
            return found.rows, None
        lowest = found.raw.amin(-1).float()
        return found.rows, torch.add(lowest, lowest.abs(), alpha=rounding) + error

    def note(self, listed: int, unsure: int) -> None:
        """Take note of the queries for which a shortlist did not do: where it is most of them, no more are made."""
        self._listed += listed
        self._unsure += unsure

    def unit_rows(self, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Rows as they are compared, of length 1 (0 where nothing is left), and what is subtracted from their similarities."""
        units = self._unit_rows(rows)
        return units, units.new_zeros(len(rows)) if self._offset is None else self._offset[rows].float()

    def subtract_hubness(self, sample: Float[Tensor, "s d"], sampled: Int[Tensor, " s"], k: int) -> None:
        """From here on take half a row's hubness from its similarities, which makes them CSLS (Conneau et al. 2018).

        They are no cosines then, and the codes are not used.

        Args:
            sample: Unit rows that say what is a hub.
            sampled: Their row numbers here; any other number where they are none of these rows.
            k: Nearest of them to average over.
        """
        offset = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        with tqdm(total=len(self), desc="hubs", unit=" rows", unit_scale=True, delay=5, leave=False) as bar:
            for first, last in self._spans(0, len(self), 64 * self.d + 16 * len(sample)):
                offset[first:last] = hubness(self._unit_rows(slice(first, last)), first, sample, sampled, k) / 2
                bar.update(last - first)
        self._offset = offset
        self._kinds, self._codes = [], None

    def _compared(self, rows: Any, dtype: torch.dtype) -> Float[Tensor, "rows d"]:
        """Rows as they are compared, but for their length."""
        if isinstance(rows, slice):
            chosen = self._vectors[rows]
        else:
            chosen = self._vectors.index_select(0, rows.to(self._vectors.device))
        exact = chosen.to(self.device).to(dtype)
        if self._to_unit is not None:
            exact = exact * self._to_unit[rows, None]
        if self._remove_means:
            exact = exact - exact.mean(-1, keepdim=True)
        return self._affine(exact)

    def _unit_rows(self, rows: Any) -> Float[Tensor, "rows d"]:
        """Rows as they are compared, float32."""
        exact = self._compared(rows, torch.float32 if self._as_stored else torch.float64)
        return (exact if self._scale is None else exact * self._scale[rows, None]).float()

    @cached_property
    def _codes(self) -> Codes | None:
        """The rows in int8 or, on a CPU, bfloat16; made at the first search, from the memory that other indices left."""
        n = len(self)
        sizes = {kind: Codes.bytes(n, self.d, kind) for kind in self._kinds}
        kinds = [kind for kind in sizes if not self._if_they_fit or _fits(sizes[kind], self.device)]
        if not kinds:
            return None
        sample = torch.linspace(0, n - 1, min(n, _SAMPLE), device=self.device).round().long()
        mean = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        for part in sample.split(max(1, self.memory_budget // (32 * self.d))):
            mean += self._unit_rows(part).sum(0, dtype=torch.float64)
        codes = Codes(n, mean / len(sample), kinds[0])
        with tqdm(total=n, desc="codes", unit=" rows", unit_scale=True, delay=5, leave=False) as bar:
            for first, last in self._spans(0, n, 64 * self.d):
                codes.put(first, self._unit_rows(slice(first, last)))
                bar.update(last - first)
        return codes

    def _parts(self, first: int, last: int, a_row: int) -> Iterator[tuple[int, int, Float[Tensor, "rows d"]]]:
        """The stored rows on the device, chunk by chunk; rows that are kept elsewhere are copied a chunk ahead.

        Args:
            first: Number of the first row.
            last: Number past the last one.
            a_row: Bytes of working memory that are needed for each.
        """
        copied = 8 * self.d * (self._vectors.dtype != self._float_pass or not self._held)
        spans = self._spans(first, last, copied + a_row)
        if self._held:
            for start, end in spans:
                yield start, end, self._vectors[start:end]
            return
        stream = torch.cuda.Stream(self.device)

        def load(span: tuple[int, int]) -> Tensor:
            with torch.cuda.stream(stream):
                part = self._vectors[slice(*span)].pin_memory().to(self.device, non_blocking=True)
            stream.synchronize()
            return part

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(load, spans[0])
            for span, after in zip(spans, [*spans[1:], None], strict=True):
                part = coming.result()
                if after is not None:
                    coming = pool.submit(load, after)
                part.record_stream(torch.cuda.current_stream(self.device))
                yield *span, part

    def _float_scores(
        self, queries: Float[Tensor, "q d"], part: Float[Tensor, "rows d"], first: int, last: int, scratch: Scratch
    ) -> Scores:
        plain = asked = self._affine.transposed(queries)
        if self._remove_means:  # the same as without the rows' means; weights and removed directions gave queries one again
            plain = asked - asked.mean(-1, keepdim=True)
        raw, rest = self._multiply(part, plain, scratch)
        rounding = 0.0
        if rest is not None and self._as_stored and self._scale is None and self._offset is None:
            rounding = 1.01 * _UNIT_ROUNDOFF[raw.dtype] * (raw.itemsize == 2)  # of the products, as a share of themselves
            error = self._product_error(rest)
            raw = raw.float() if self.device.type == "cpu" else raw
        else:
            error = self._error_bound() * asked.norm(dim=-1).clamp(min=1)
            raw = raw[:, : len(asked)].float().contiguous()
            real = raw[: last - first]
            if self._to_unit is not None:
                real *= self._to_unit[first:last, None].float()
            if self._affine.center is not None:
                real -= (asked.double() @ self._affine.center).float()
            if self._scale is not None:
                real *= self._scale[first:last, None].float()
            if self._offset is not None:
                real -= self._offset[first:last, None].float()
        none, one = self._none.expand_as(error), self._one.expand_as(error)
        return Scores(None, coded=error, uncoded=none, unit=one, offset=none, rounding=rounding, raw=raw)

    def _multiply(
        self, part: Float[Tensor, "rows d"], queries: Float[Tensor, "q d"], scratch: Scratch
    ) -> tuple[Float[Tensor, "padded columns"], Float[Tensor, " q"] | None]:
        """Products, and the length of what rounding took from each query, or None: see `_error_bound`.

        The products of the last rows, which make up whole groups, are -inf; the last columns are made up.
        """
        n, padded = len(part), -(-len(part) // WIDE) * WIDE
        kernels = _kernels() if len(queries) == 1 and part.is_cuda else None
        if kernels is not None:
            return kernels.product(part, queries, padded), self._none
        if part.dtype != self._float_pass:
            part = scratch(n, self.d, self._float_pass).copy_(part)
        asked = queries.to(self._float_pass)
        rest = None if self._float_pass == torch.float32 else (queries - asked.float()).norm(dim=-1)
        if part.is_cuda and part.itemsize == 2:
            asked = torch.nn.functional.pad(asked, (0, 0, 0, -len(asked) % 8))  # other widths are multiplied more slowly
        products = asked.new_empty((padded, len(asked)))
        products[n:] = -torch.inf
        with _full_accumulation():
            torch.mm(part, asked.T, out=products[:n])
        return products, rest

    def _product_error(self, rest: Float[Tensor, " q"]) -> Float[Tensor, " q"]:
        """As `_error_bound`, for rows as they are stored, but for the rounding of the product.

        Args:
            rest: Length of what rounding took away from each query.
        """
        rows = _UNIT_ROUNDOFF[self._float_pass] * (self._vectors.dtype != self._float_pass)
        return (rest + (rows + 1.01 * (self.d + 2) * 2.0**-23)) * (1.0 + _LARGEST_TOLERANCE)

    def _error_bound(self) -> float:
        """Most that a product of the float pass with a query of length 1 can differ from the exact similarity."""
        unit_roundoff = _UNIT_ROUNDOFF[self._float_pass]
        product = 2.0**-24
        if self._float_pass == torch.float32:
            # "high" multiplies in TF32 (2^-11) and "medium" in bfloat16, where the hardware has them.
            unit_roundoff = {"highest": 0.0, "high": 2.0**-11}.get(_float32_precision(), 2.0**-8)
        else:
            product += unit_roundoff  # the product is rounded to the same type
        if self._remove_means:
            product += 2.0**-23  # queries have mean 0 up to rounding: a row's own mean adds next to nothing to its product
        if self._offset is not None:
            product += 2.0**-22  # of the subtraction, and of the offset in float32
        return (2 * unit_roundoff + product + self.d * 2.0**-23) * (self._stretch + self._center_stretch)

    @property
    def float32_error(self) -> float:
        """Most that a similarity summed in float32 can differ from the exact one."""
        return (2.0**-23 + self.d * 2.0**-23) * max(1.0 + _LARGEST_TOLERANCE, self._stretch)

    def _spans(self, first: int, last: int, a_row: int) -> list[tuple[int, int]]:
        """Chunks of rows that take half the memory budget, at `a_row` bytes each; whole groups of rows, at least one."""
        step = self._step(a_row)
        return [(start, min(start + step, last)) for start in range(first, last, step)]

    def _step(self, a_row: int) -> int:
        most = self.memory_budget // 2
        step = (min(most, _CPU_CHUNK) if self.device.type == "cpu" else most) // a_row
        return max(GROUP, step // WIDE * WIDE)


@cache
def _kernels() -> Any:
    """The module of kernels, tried out, or None: no Triton, no C compiler for it, a GPU that it does not know."""
    try:
        from tl_latentlens.search import gpu_kernels as kernels

        row, at = torch.ones((1, 8), dtype=torch.float32, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        found = float(kernels.dots(row, row, at, at, torch.float64)) * float(kernels.product(row, row, 1))
    except Exception:  # of many kinds, and torch's operators do the same
        return None
    return kernels if found == 64 else None


def _working_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory // 16 if device.type == "cuda" else 2**28


def _fits(n_bytes: int, device: torch.device) -> bool:
    """True where that many bytes, and working memory, leave a fifth of a GPU's free memory, or half of a CPU's."""
    return n_bytes + _working_memory(device) <= (0.8 if device.type == "cuda" else 0.5) * free_memory(device)


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


def as_tensor(vectors: Tensor | np.ndarray) -> Tensor:
    """A tensor over the same memory; bfloat16 arrays (ml_dtypes) become torch bfloat16."""
    if isinstance(vectors, Tensor):
        held, real = vectors.detach(), not vectors.is_complex()
    else:
        held = np.asarray(vectors)
        real = held.dtype.kind in "fiubV"  # ml_dtypes' are V
    if not real:
        raise InvalidInputError(f"got a {type(vectors).__name__} of {held.dtype}; expected real numbers, a tensor or an array")
    if isinstance(held, Tensor):
        return held
    if held.dtype.name == "bfloat16":
        return _from_numpy(held.view(np.uint16)).view(torch.bfloat16)
    return _from_numpy(held)


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
    tensor = as_tensor(queries)
    if tensor.numel() > _SMALL:
        tensor = tensor.to(device)
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
    good = (lengths > 0) & (lengths < torch.inf)
    if not bool(good.all()):
        bad = ~good[..., 0]
        where = tuple(torch.nonzero(bad)[0].tolist())
        kind = "zero" if bool((lengths[..., 0] == 0)[where]) else "NaN or inf"
        at = f" at index {where}" if where else ""
        raise InvalidInputError(f"{int(bad.sum())} of {bad.numel()} queries cannot be compared: the query{at} is {kind}")
    return (exact / lengths).float().to(device)
