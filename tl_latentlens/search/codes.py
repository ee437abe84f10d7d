"""Rows in one or two bytes a number: products of these codes are cheap scores, whose error is known.

Which codes a processor multiplies fastest, and how, is known here alone.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tl_latentlens.search.candidates import GROUP, Bounds, Scores, Scratch, compiled_loops

_SLACK = 4e-6  # float32 rounding of the codes' scales, lengths and products, all at most about 1
_ROUNDING = 1.01 * 2.0**-8  # of a number to bfloat16, as a share of it
_UNSIGNED_LEVELS = 64  # of signed bytes: AVX2 adds two products with unsigned ones in 16 bits, 2 * 255 * 64 < 2^15


def fast_codes(device: torch.device, n_rows: int) -> list[torch.dtype]:
    """What multiplies faster than float32, the most precise first: bfloat16 on CPUs with AMX, bytes on CPUs and on NVIDIA."""
    if device.type == "cuda":
        return [torch.int8]
    amx = torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    bytes_too = _tiles(device, n_rows) is not None or _has_vnni() or _multiplies_unsigned()
    return [torch.bfloat16] * amx + [byte_codes(device, n_rows)] * bytes_too


def byte_codes(device: torch.device, n_rows: int) -> torch.dtype:
    """The codes of one byte a number that this device multiplies fastest: unsigned by compiled loops and with AVX2 alone."""
    if _tiles(device, n_rows) is not None:
        return torch.uint8
    return torch.uint8 if device.type == "cpu" and not _has_vnni() and _multiplies_unsigned() else torch.int8


def _tiles(device: torch.device, n_rows: int) -> Any:
    """The compiled loops, where they multiply bytes."""
    loops = compiled_loops(device, n_rows)
    return loops if loops is not None and loops.LEVELS else None


def _has_vnni() -> bool:
    return torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_vnni_supported", bool)()


@cache
def _multiplies_unsigned() -> bool:
    """True where oneDNN multiplies bytes on a CPU with AVX2, and gets sums of the largest right."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):  # elsewhere it does so one by one
        return False
    codes = torch.full((32, 64), 255, dtype=torch.uint8)
    signed = torch.full((8, 64), _UNSIGNED_LEVELS, dtype=torch.int8)
    signed[::2] *= -1
    try:
        product = _unsigned_product(codes, _packed(signed), torch.zeros(8, dtype=torch.float32))
    except (AttributeError, RuntimeError, TypeError):  # a torch whose operator is another, or that was built without it
        return False
    return torch.equal(product, codes.float() @ signed.float().T)


def _packed(signed: Int[Tensor, "q d"]) -> Tensor:
    """Signed bytes as oneDNN multiplies them."""
    return torch.ops.onednn.qlinear_prepack(signed, None)


def _unsigned_product(codes: UInt8[Tensor, "rows d"], packed: Tensor, bias: Float[Tensor, " q"]) -> Float[Tensor, "rows q"]:
    """Products of unsigned bytes with packed signed ones, plus a number for each of these; sums are of integers."""
    one, zero = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, packed, one, zero, bias, 1.0, 0, torch.float32, "none", [], "")


@dataclass(frozen=True)
class QueryCodes:
    """Queries in few bits: `query = size * (codes + rest)`.

    Attributes:
        codes: As they are multiplied.
        width: How many products they give for a row; past the queries these count for nothing.
        bias: Added to the products.
        size: What one of a query's numbers is worth.
        length: Length of the codes.
        rest: Length of the rest.
        offset: Product with the rows' mean.
    """

    codes: Tensor
    width: int
    bias: Float[Tensor, " width"]
    size: Float[Tensor, " q"]
    length: Float[Tensor, " q"]
    rest: Float[Tensor, " q"]
    offset: Float[Tensor, " q"]


class Codes:
    """Rows in few bits, bytes or bfloat16, after their mean is taken away; bytes with one scale for each 16 rows.

    A row is `mean + scale * (codes + rest)`, a query `size * (codes + rest)`. With r the row without the mean, the product of
    the two codes, times both scales, misses query · r by at most size |query's rest| |r| + size scale
    |query's codes| |row's rest| (Cauchy-Schwarz). The lengths are measured, not estimated: the largest of a chunk's rows.
    Integer products are exact; bfloat16 ones are summed in float32 and rounded once. uint8 is int8 plus 128, which is taken off
    the products again; queries have fewer levels where the processor has no VNNI.

    Attributes:
        seen_as_made: True where scores need not all be in memory to be looked at.
    """

    def __init__(self, n: int, mean: Float[Tensor, " d"], dtype: torch.dtype) -> None:
        """Make room; `put` encodes the rows.

        Args:
            n: Number of rows.
            mean: What to take away from every row; any vector is right, the rows' mean is best.
            dtype: torch.int8, torch.uint8 or torch.bfloat16.
        """
        device, padded, wide = mean.device, _up(n, GROUP), _up(len(mean), 8)  # CUDA multiplies sizes that are multiples of 8
        self.mean = mean.float()
        self._codes = torch.zeros((padded + GROUP, wide), dtype=dtype, device=device)
        self._unsigned = dtype == torch.uint8
        self._tiles = _tiles(device, n) if self._unsigned else None
        self.seen_as_made = self._tiles is not None
        self._levels = self._tiles.LEVELS if self._tiles is not None else _UNSIGNED_LEVELS if self._unsigned else 127
        scale, self._length, self._rest = (torch.empty(padded // GROUP, dtype=torch.float32, device=device) for _ in range(3))
        self._scale = None if dtype == torch.bfloat16 else scale

    def put(self, first: int, rows: Float[Tensor, "rows d"]) -> None:
        """Encode the rows from `first` (a multiple of 16) on: as they are compared, of length 1 or 0, float32."""
        groups = slice(first // GROUP, _up(first + len(rows), GROUP) // GROUP)
        loops = compiled_loops(rows.device, len(self._codes))
        if loops is not None and self._scale is not None and len(rows) % GROUP == 0:
            places = self._codes[first : first + len(rows)].unflatten(0, (-1, GROUP))
            parts = (self._scale[groups], self._length[groups], self._rest[groups])
            loops.encode(rows.unflatten(0, (-1, GROUP)), self.mean, places, *parts)
            return
        grouped = torch.nn.functional.pad(rows - self.mean, (0, 0, 0, -len(rows) % GROUP)).unflatten(0, (-1, GROUP))
        units = grouped
        if self._scale is not None:
            self._scale[groups] = grouped.abs().amax((1, 2)).clamp(min=1e-30) / 127
            units = grouped / self._scale[groups, None, None]
        codes = self._round(units) + 128 * self._unsigned
        self._codes[first : first + codes[..., 0].numel(), : len(self.mean)] = codes.flatten(0, 1)
        self._length[groups] = grouped.norm(dim=-1).amax(1)
        self._rest[groups] = (units - codes + 128 * self._unsigned).norm(dim=-1).amax(1)

    @staticmethod
    def bytes(n: int, d: int, dtype: torch.dtype) -> int:
        """Memory that the codes of n rows take."""
        return _up(n, GROUP) * (dtype.itemsize * _up(d, 8) + 1)

    def encode(self, queries: Float[Tensor, "q d"]) -> QueryCodes:
        """Round unit queries."""
        offset = (queries.double() @ self.mean.double()).float()
        size = queries.new_ones(len(queries)) if self._scale is None else queries.abs().amax(-1) / self._levels
        units = queries / size[:, None]
        codes = self._round(units)
        more = 0 if self._unsigned else -len(codes) % 8
        wide = torch.nn.functional.pad(codes, (0, self._codes.shape[1] - codes.shape[1], 0, more))
        bias = -128 * wide.sum(-1) * self._unsigned
        if self._tiles is not None:
            packed = self._tiles.pack(wide)
            width = packed[:, 0].numel()
        else:
            wide, width = wide.to(torch.int8 if self._unsigned else self._codes.dtype), len(wide)
            packed = _packed(wide) if self._unsigned else wide.T
        return QueryCodes(packed, width, bias, size, codes.norm(dim=-1), (units - codes).norm(dim=-1), offset)

    def _round(self, units: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return units.bfloat16().float() if self._scale is None else units.round()

    def scores(self, queries: QueryCodes, first: int, last: int, scratch: Scratch) -> Scores:
        """Scores of rows `first` (a multiple of 16) to `last`, in scratch memory."""
        bounds, n_rows = self.bounds(queries, first, last), _up(last - first, GROUP)
        codes = self._codes[first : first + max(n_rows, 2 * GROUP)]  # CUDA multiplies more than 16 rows
        if self._scale is None:
            raw = torch.mm(codes, queries.codes, out=scratch(len(codes), queries.width, codes.dtype))
        elif self._tiles is not None:
            raw = scratch(len(codes), queries.width, torch.int32)
            self._tiles.products(codes, queries.codes, raw)
        elif self._unsigned:
            raw = _unsigned_product(codes, queries.codes, queries.bias)
        else:
            raw = scratch(len(codes), queries.width, torch.int32)
            torch._int_mm(codes, queries.codes, out=raw)  # pyright: ignore[reportPrivateImportUsage]
        return Scores(**vars(bounds), raw=raw[:n_rows])

    def reaching(
        self, queries: QueryCodes, first: int, last: int, least: Float[Tensor, "groups q"], room: int
    ) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Int[Tensor, " pairs"]] | None:
        """Rows, from `first` on, and queries whose raw score reaches a least one, and these scores; where `seen_as_made`.

        None where there are more than `room`.
        """
        assert self._tiles is not None
        codes = self._codes[first : first + _up(last - first, GROUP)]
        return self._tiles.reach_products(codes, queries.codes, least, last - first, room)

    def bounds(self, queries: QueryCodes, first: int, last: int) -> Bounds:
        """What the scores of rows `first` (a multiple of 16) to `last` are worth, and how far they can be off."""
        groups = slice(first // GROUP, _up(last, GROUP) // GROUP)
        length, d = self._length[groups].max(), self._codes.shape[1]
        coded = self._rest[groups].max() * queries.length
        uncoded = length * queries.rest + _SLACK / queries.size
        if self._scale is None:
            coded = coded + length * queries.length * d * 2.0**-23
            return Bounds(None, coded, uncoded, queries.size, queries.offset, _ROUNDING)
        if self._unsigned and self._tiles is None:
            coded = coded + d * 255 * _UNSIGNED_LEVELS * 2.0**-22  # sums past 2^24 are rounded to float32
        return Bounds(self._scale[groups], coded, uncoded, queries.size, queries.offset)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
