"""Loops of a CPU search, compiled by numba (extra "fast"): what torch's operators do too, in one pass over the scores.

torch parts each operator among threads that wait for one another, and where other processes take a core, a search of many
small ones is mostly that wait. Products of bytes are looked at where they are made, 16 rows at a time, and are never all
in memory; other products stay with torch. The instructions that processors have for products of bytes are written into the
loops, here and in no other file, since numba looks at this one alone to tell whether what it kept is still right.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Integer, UInt8
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

from tl_latentlens.search.candidates import GROUP
from tl_latentlens.search.threads import in_threads

_A_THREAD = 2**17  # numbers that are worth a thread
_BLOCK = 128  # scores that are looked at at once
_AHEAD = 2  # rows that are on their way while one is multiplied
_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LINE = 64  # bytes that memory brings at once


@dataclass(frozen=True)
class _Instructions:
    """What a processor multiplies bytes with.

    Attributes:
        lanes: Sums in a register, each of another query.
        rows: Rows of a tile, each with a register.
        levels: Most that a signed byte may be, so that no sum of products is cut off on the way; 0: there are no instructions.
        add: Adds the products of four unsigned bytes with four signed ones to each lane of the sums.
    """

    lanes: int
    rows: int
    levels: int
    add: Callable[[Any, Any, Any, Any], Any]


def _call(builder: Any, name: str, kind: Any, *operands: Any) -> Any:
    declared = ir.FunctionType(kind, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, declared, name), operands)


def _by_avx512_vnni(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", sums.type, sums, unsigned, signed)


def _by_avx_vnni(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    return _call(builder, "llvm.x86.avx512.vpdpbusd.256", sums.type, sums, unsigned, signed)


def _by_avx2(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Two products are added in 16 bits, cut off at the ends: 2 * 255 * 64 < 2^15."""
    unsigned, signed = (builder.bitcast(part, ir.VectorType(_BYTE, 32)) for part in (unsigned, signed))
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_SHORT, 16), unsigned, signed)
    ones = ir.Constant(pairs.type, [1] * 16)
    return builder.add(sums, _call(builder, "llvm.x86.avx2.pmadd.wd", sums.type, pairs, ones))


def _of_processor() -> _Instructions:
    """The best that numba compiles for here."""
    target: Any = cpu_target.target_context
    features = set(target.codegen().magic_tuple()[2].split(","))
    if "+avx512vnni" in features:
        return _Instructions(16, 16, 127, _by_avx512_vnni)
    if "+avxvnni" in features:
        return _Instructions(8, 8, 127, _by_avx_vnni)
    return _Instructions(8, 8, 64 if "+avx2" in features else 0, _by_avx2)


_INSTRUCTIONS = _of_processor()
_LANES, _ROWS, LEVELS = _INSTRUCTIONS.lanes, _INSTRUCTIONS.rows, _INSTRUCTIONS.levels


def reach(
    raw: Tensor, least: Float[Tensor, "groups q"], group: int, n_rows: int, room: int
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Tensor] | None:
    """Rows and queries whose score reaches a least one, row by row, and their scores; None where there are more than `room`.

    Args:
        raw: Scores [rows, columns] on the CPU, int32, float32 or bfloat16; columns past the queries count for nothing.
        least: For each group of rows.
        group: Rows in a group.
        n_rows: How many rows of `raw` count.
        room: Most pairs.
    """
    loop = _reach_bfloat16 if raw.dtype == torch.bfloat16 else _reach
    scores, floors = _as_array(raw), least.numpy()

    def part(first: int, last: int, *outs: np.ndarray) -> int:
        some = floors if len(floors) == 1 else floors[first // group :]
        return loop(scores[first:], some, group, last - first, *outs)

    return _reaching(part, n_rows, 1 if len(floors) == 1 else group, floors.shape[1], n_rows * floors.shape[1], room, raw.dtype)


def reach_products(
    codes: UInt8[Tensor, "rows d"],
    panels: Int32[Tensor, "panels steps lanes"],
    least: Float[Tensor, "groups q"],
    n_rows: int,
    room: int,
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Tensor] | None:
    """As `reach`, for products that are made and looked at 16 rows at a time.

    Args:
        codes: Whole groups of 16 rows.
        panels: Queries, as `pack` has them.
        least: For each group of rows.
        n_rows: How many rows of `codes` count.
        room: Most pairs.
    """
    rows, asked, floors = codes.numpy(), panels.numpy(), least.numpy()

    def part(first: int, last: int, *outs: np.ndarray) -> int:
        return _reach_products(rows[first:], asked, floors[first // GROUP :], last - first, *outs)

    return _reaching(part, n_rows, GROUP, floors.shape[1], n_rows * codes.shape[1] * len(panels), room, torch.int32)


def _reaching(
    loop: Callable[..., int], n_rows: int, group: int, n_queries: int, n_numbers: int, room: int, kind: torch.dtype
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"], Tensor] | None:
    """Parts of the rows in threads: `loop(first, last, rows, queries, values)` fills the last three, and counts."""
    kind = torch.int32 if kind == torch.int32 else torch.float32
    each = -(-n_rows // _n_threads(n_numbers) // group) * group
    most = min(room, each * n_queries)

    def part(first: int) -> tuple[int, int, tuple[Tensor, ...]]:
        outs = tuple(torch.empty(most, dtype=dtype) for dtype in (torch.int32, torch.int32, kind))
        return first, loop(first, min(first + each, n_rows), *(out.numpy() for out in outs)), outs

    found = in_threads(part, range(0, n_rows, each))
    if sum(count for _, count, _ in found) > room:
        return None
    parts = [(first + rows[:count], queries[:count], values[:count]) for first, count, (rows, queries, values) in found]
    rows, queries, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return rows.long(), queries.long(), values


def pack(queries: Float[Tensor, "q d"]) -> Int32[Tensor, "panels steps lanes"]:
    """Queries as tiles read them: what sums start with, then four bytes of each query at every step.

    Args:
        queries: Whole numbers from -LEVELS to LEVELS; d is a multiple of 4.
    """
    signed = torch.nn.functional.pad(queries, (0, 0, 0, -len(queries) % _LANES)).to(torch.int8)
    start = signed.sum(-1, dtype=torch.int32).mul_(-128)  # rows are unsigned, 128 more than they count
    fours = signed.view(torch.int32).view(-1, _LANES, queries.shape[1] // 4).transpose(1, 2)
    return torch.cat([start.view(-1, 1, _LANES), fours], 1)


def products(
    codes: UInt8[Tensor, "rows d"], panels: Int32[Tensor, "panels steps lanes"], out: Int32[Tensor, "rows columns"]
) -> None:
    """Products of unsigned bytes, less 128, with packed queries.

    Args:
        codes: Whole groups of 16 rows.
        panels: Queries, as `pack` has them.
        out: Filled; as many columns as all panels are wide.
    """
    asked, groups = panels.numpy(), (codes.unflatten(0, (-1, GROUP)), out.unflatten(0, (-1, GROUP)))

    def part(*some: np.ndarray) -> None:
        rows, sums = (one.reshape(-1, one.shape[-1]) for one in some)
        _products(rows, asked, sums)

    _in_parts(part, codes.numel() * len(panels), *groups)


def encode(
    rows: Float[Tensor, "groups group d"],
    mean: Float[Tensor, " d"],
    codes: Integer[Tensor, "groups group wide"],
    scale: Float[Tensor, " groups"],
    length: Float[Tensor, " groups"],
    rest: Float[Tensor, " groups"],
) -> None:
    """Round rows without their mean to bytes, `row = mean + scale * (codes + rest)`.

    Args:
        rows: float32.
        mean: What is taken away.
        codes: Filled with -127 to 127, and 128 more where they are unsigned.
        scale: Filled.
        length: Filled with the largest length of a group's rows without the mean.
        rest: Filled with the largest length of a group's rests.
    """
    shift = 128 if codes.dtype == torch.uint8 else 0
    _in_parts(lambda *part: _encode(*part, mean.numpy(), shift), rows.numel(), rows, codes, scale, length, rest)


def dots(
    vectors: Float[Tensor, "n d"],
    queries: Float[Tensor, "q d"],
    rows: Int[Tensor, " pairs"],
    of: Int[Tensor, " pairs"],
    dtype: torch.dtype,
) -> Float[Tensor, " pairs"]:
    """Dot products of pairs of a row and a query, summed in a given precision; equal rows give equal bits.

    Args:
        vectors: On the CPU, float16, bfloat16 or float32.
        queries: float32.
        rows: Of each pair the row, and
        of: the query.
        dtype: torch.float32 or torch.float64.
    """
    loop = {torch.float16: _dots_float16, torch.bfloat16: _dots_bfloat16, torch.float32: _dots_float32}[vectors.dtype]
    stored, asked = _as_array(vectors), queries.to(dtype).numpy()
    found = torch.empty(len(rows), dtype=dtype)
    _in_parts(lambda *pairs: loop(stored, asked, *pairs), len(rows) * vectors.shape[1], rows, of, found)
    return found


def _in_parts(loop: Callable[..., Any], n_numbers: int, *split: Tensor) -> None:
    """Call a loop with parts of the tensors, as many as there are threads where the work is worth that."""
    n_threads = _n_threads(n_numbers)
    parts = zip(*([part.numpy() for part in tensor.tensor_split(n_threads)] for tensor in split), strict=True)
    in_threads(lambda some: loop(*some), parts)


def _n_threads(n_numbers: int) -> int:
    return max(1, min(torch.get_num_threads(), n_numbers // _A_THREAD))


def _as_array(tensor: Tensor) -> np.ndarray:
    """The same memory; bits in place of half precision, which numba knows on GPUs alone."""
    return (tensor.view(torch.uint16) if tensor.itemsize == 2 else tensor).numpy()


def _loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when it is first called, once for each combination of types; kept on the disk where that can be written."""
    function = inspect.unwrap(function)  # of runtime shape checks, where an import hook adds them
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "nnan"}}  # vectors of partial sums
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep it in
        return numba.njit(**options)(function)


def _write_tile(_: Any, rows: Any, row_bytes: Any, panel: Any, steps: Any, sums: Any, sum_bytes: Any, highest: Any) -> Any:
    """Sums of products of a tile's rows and queries; asks memory for the bytes of the rows that come 32 rows on.

    Args:
        rows: Address of the first row's bytes, unsigned.
        row_bytes: From a row to the next.
        panel: Address of what sums start with, one for each query, then of four signed bytes of each query for every step.
        steps: How many times four bytes there are.
        sums: Address of the first row's sums, int32.
        sum_bytes: From a row's sums to the next row's.
        highest: Address of the largest sum of each query.
    """
    vector = ir.VectorType(_INT, _INSTRUCTIONS.lanes)
    undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(vector, None)

    def at(builder: Any, address: Any, kind: Any) -> Any:
        return builder.inttoptr(address, kind.as_pointer())

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row_bytes, panel, steps, sums, sum_bytes, highest = arguments
        start = builder.load(at(builder, panel, vector), align=4)
        totals = [cgutils.alloca_once_value(builder, start) for _ in range(_INSTRUCTIONS.rows)]
        ahead = builder.add(rows, builder.mul(row_bytes, _LONG(32)))
        with cgutils.for_range(builder, steps) as loop:
            line = at(builder, builder.add(ahead, builder.mul(loop.index, _LONG(_LINE))), _BYTE)
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), line, _INT(0), _INT(3), _INT(1))
            step = builder.mul(builder.add(loop.index, _LONG(1)), _LONG(4 * _INSTRUCTIONS.lanes))
            queries = builder.load(at(builder, builder.add(panel, step), vector), align=4)
            place = builder.add(rows, builder.mul(loop.index, _LONG(4)))
            for total in totals:
                four = builder.load(at(builder, place, _INT), align=1)
                every = builder.shuffle_vector(builder.insert_element(undefined, four, _INT(0)), undefined, zeros)
                builder.store(_INSTRUCTIONS.add(builder, builder.load(total), every, queries), total)
                place = builder.add(place, row_bytes)
        found = [builder.load(total) for total in totals]
        for total in found:
            builder.store(total, at(builder, sums, vector), align=4)
            sums = builder.add(sums, sum_bytes)
        most = reduce(lambda one, other: builder.select(builder.icmp_signed(">", one, other), one, other), found)
        builder.store(most, at(builder, highest, vector), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


_tile: Any = intrinsic(_write_tile)


@_loop
def _reach(raw, least, group, n_rows, rows, queries, values):
    n_queries, count, room = least.shape[1], 0, len(rows)
    for row in range(n_rows):
        for first in range(0, n_queries, _BLOCK):
            some = raw[row, first : min(first + _BLOCK, n_queries)]
            floor = least[row // group, first : first + len(some)]
            if _hits(some, floor):
                for query in range(len(some)):
                    if some[query] >= floor[query]:
                        if count < room:
                            rows[count], queries[count], values[count] = row, first + query, some[query]
                        count += 1
        if count > room:
            break
    return count


@_loop
def _hits(some, floor):
    """How many reach: without a branch and from zero on, so that many are compared at once."""
    hits = np.int32(0)
    for i in range(len(some)):
        hits += np.int32(some[i] >= floor[i])
    return hits


@_loop
def _reach_bfloat16(raw, least, group, n_rows, rows, queries, values):
    bits = np.zeros((1, least.shape[1]), np.uint32)
    wide, count = bits.view(np.float32), 0
    for row in range(n_rows):
        _widen_bfloat16(raw[row], bits[0])
        group_of = row // group
        more = _reach(wide, least[group_of : group_of + 1], 1, 1, rows[count:], queries[count:], values[count:])
        rows[count : count + more] = row
        count += more
        if count > len(rows):
            break
    return count


@_loop
def _reach_products(codes, panels, least, n_rows, rows, queries, values):
    n_queries, count, room = least.shape[1], 0, len(rows)
    sums, highest = np.empty((_ROWS, len(panels) * _LANES), np.int32), np.empty(len(panels) * _LANES, np.int32)
    for first in range(0, n_rows, _ROWS):
        _multiply(codes[first : first + _ROWS], panels, sums, highest)
        floor = least[first // GROUP : first // GROUP + 1]
        if _hits(highest[:n_queries], floor[0]):
            here = min(_ROWS, n_rows - first)
            more = _reach(sums, floor, GROUP, here, rows[count:], queries[count:], values[count:])
            rows[count : count + more] += first
            count += more
        if count > room:
            break
    return count


@_loop
def _multiply(codes, panels, sums, highest):
    steps, panel_bytes, row_bytes, sum_bytes = panels.shape[1] - 1, panels.strides[0], codes.strides[0], sums.strides[0]
    for panel in range(len(panels)):
        start, column = panels.ctypes.data + panel * panel_bytes, 4 * _LANES * panel
        _tile(codes.ctypes.data, row_bytes, start, steps, sums.ctypes.data + column, sum_bytes, highest.ctypes.data + column)


@_loop
def _products(codes, panels, sums):
    highest = np.empty(sums.shape[1], np.int32)
    for first in range(0, len(codes), _ROWS):
        _multiply(codes[first : first + _ROWS], panels, sums[first : first + _ROWS], highest)


@_loop
def _encode(rows, codes, scale, length, rest, mean, shift):
    centered = np.empty(rows.shape[1:], np.float32)
    for group in range(len(rows)):
        longest, largest, farthest = np.float32(0), np.float32(1e-30), np.float32(0)
        for row in range(len(centered)):
            longest = max(longest, _center(rows[group, row], mean, centered[row]))
            largest = max(largest, _largest(centered[row]))
        scale[group] = largest / np.float32(127)
        for row in range(len(centered)):
            places = codes[group, row, : len(mean)]
            _round(centered[row], np.float32(1) / scale[group], np.int32(shift), places)
            farthest = max(farthest, _rest(centered[row], np.float32(1) / scale[group], np.int32(shift), places))
        length[group], rest[group] = np.sqrt(longest), np.sqrt(farthest)


@_loop
def _center(row, mean, centered):
    squares = np.float32(0)
    for i in range(len(mean)):
        centered[i] = row[i] - mean[i]
        squares += centered[i] * centered[i]
    return squares


@_loop
def _largest(numbers):
    largest = np.float32(0)
    for i in range(len(numbers)):
        size = abs(numbers[i])
        largest = size if size > largest else largest
    return largest


@_loop
def _round(numbers, inverse, shift, codes):
    for i in range(len(numbers)):
        # Cut off at zero, above which all of them are: 127 are added, and taken away again.
        codes[i] = np.int32(numbers[i] * inverse + np.float32(127.5)) - np.int32(127) + shift


@_loop
def _rest(numbers, inverse, shift, codes):
    squares = np.float32(0)
    for i in range(len(numbers)):
        rest = numbers[i] * inverse - np.float32(np.int32(codes[i]) - shift)
        squares += rest * rest
    return squares


@_loop
def _widen_bfloat16(half, bits):
    for i in range(len(bits)):
        bits[i] = np.uint32(half[i]) << np.uint32(16)


@_loop
def _widen_float16(half, bits, wide):
    for i in range(len(bits)):
        exponent_and_more = np.uint32(half[i] & 0x7FFF) << np.uint32(13)
        bits[i] = exponent_and_more + np.uint32(112 << 23) | np.uint32(half[i] & 0x8000) << np.uint32(16)
    floats = bits.view(np.float32)
    for i in range(len(bits)):
        small = np.float32(np.int32(half[i] & 0x3FF)) * np.float32(2.0**-24)  # below 2^-14, without a leading one
        small = -small if half[i] & 0x8000 else small
        wide[i] = floats[i] if half[i] & 0x7C00 else small


@_loop
def _dot(wide, query):
    total = query.dtype.type(0)
    for i in range(len(query)):
        total += wide[i] * query[i]
    return total


@_loop
def _touch(row):
    """Ask for a row, so that memory brings it while others are multiplied; the sum is there for its reading alone."""
    total = row[0]
    for i in range(0, len(row), _LINE // 2):
        total += row[i]
    return total


@_loop
def _dots_float32(vectors, queries, rows, of, found):
    touched, last = vectors[0, 0], len(rows) - 1
    for pair in range(len(rows)):
        touched += _touch(vectors[rows[min(pair + _AHEAD, last)]])
        found[pair] = _dot(vectors[rows[pair]], queries[of[pair]])
    return touched


@_loop
def _dots_bfloat16(vectors, queries, rows, of, found):
    bits, touched, last = np.empty(vectors.shape[1], np.uint32), vectors[0, 0], len(rows) - 1
    for pair in range(len(rows)):
        touched += _touch(vectors[rows[min(pair + _AHEAD, last)]])
        _widen_bfloat16(vectors[rows[pair]], bits)
        found[pair] = _dot(bits.view(np.float32), queries[of[pair]])
    return touched


@_loop
def _dots_float16(vectors, queries, rows, of, found):
    bits, wide = np.empty(vectors.shape[1], np.uint32), np.empty(vectors.shape[1], np.float32)
    touched, last = vectors[0, 0], len(rows) - 1
    for pair in range(len(rows)):
        touched += _touch(vectors[rows[min(pair + _AHEAD, last)]])
        _widen_float16(vectors[rows[pair]], bits, wide)
        found[pair] = _dot(wide, queries[of[pair]])
    return touched
