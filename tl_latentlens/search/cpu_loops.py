"""Loops of a CPU search that numba compiles: one pass over the scores, products of bytes compared where they are made.

The processor's instructions for products of bytes are written into the loops, here and in no other file: numba looks at this
file alone to tell whether what it compiled before is still right. `cpu_kernels` splits the work among threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from tl_latentlens.search.chunks import GROUP_ROWS
from tl_latentlens.search.compile_loop import compile_loop

_COMPARED_SCORES = 128  # Scores that are compared with the threshold together.
_CACHE_LINE_BYTES = 64
_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))


@dataclass(frozen=True)
class _Instructions:
    """The instructions with which a processor multiplies bytes.

    Attributes:
        lanes: Sums in a register, each of another query.
        rows: Rows of a tile, each with a register.
        max_signed: The largest signed byte for which no sum of products overflows on the way. 0: there are no instructions.
        add: Adds the products of four unsigned bytes with four signed ones to each lane of the sums.
    """

    lanes: int
    rows: int
    max_signed: int
    add: Callable[[Any, Any, Any, Any], Any]


def _call(builder: Any, name: str, kind: Any, *operands: Any) -> Any:
    declared = ir.FunctionType(kind, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, declared, name), operands)


def _by_avx512_vnni(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", sums.type, sums, unsigned, signed)


def _by_avx_vnni(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    return _call(builder, "llvm.x86.avx512.vpdpbusd.256", sums.type, sums, unsigned, signed)


def _by_avx2(builder: Any, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Two products are added in 16 bits, where 2 * 255 * 64 < 2^15 does not overflow."""
    unsigned, signed = (builder.bitcast(vector, ir.VectorType(_BYTE, 32)) for vector in (unsigned, signed))
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_SHORT, 16), unsigned, signed)
    ones = ir.Constant(pairs.type, [1] * 16)
    return builder.add(sums, _call(builder, "llvm.x86.avx2.pmadd.wd", sums.type, pairs, ones))


def _find_instructions() -> _Instructions:
    """The best instructions that numba compiles for on this processor."""
    target: Any = cpu_target.target_context
    features = set(target.codegen().magic_tuple()[2].split(","))
    if "+avx512vnni" in features:
        return _Instructions(16, 16, 127, _by_avx512_vnni)
    if "+avxvnni" in features:
        return _Instructions(8, 8, 127, _by_avx_vnni)
    return _Instructions(8, 8, 64 if "+avx2" in features else 0, _by_avx2)


_INSTRUCTIONS = _find_instructions()
LANES, _TILE_ROWS = _INSTRUCTIONS.lanes, _INSTRUCTIONS.rows
MAX_QUERY_CODE = _INSTRUCTIONS.max_signed  # Codes of queries go from minus this to this; 0: bytes are not multiplied here.


def _write_tile(_: Any, rows: Any, row_bytes: Any, panel: Any, steps: Any, sums: Any, sum_bytes: Any, highest: Any) -> Any:
    """Generate the sums of products of a tile's rows and queries; prefetches the bytes of the rows that come 32 rows later.

    Args:
        rows: Address of the first row's bytes, unsigned.
        row_bytes: Bytes from one row to the next.
        panel: Address of the numbers that sums start with, one for each query; four signed bytes of each query follow for
            every step.
        steps: Number of steps, of four bytes each.
        sums: Address of the first row's sums, int32.
        sum_bytes: Bytes from one row's sums to the next row's.
        highest: Address of the largest sum of each query.
    """
    vector = ir.VectorType(_INT, _INSTRUCTIONS.lanes)
    undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(vector, None)

    def pointer(builder: Any, address: Any, kind: Any) -> Any:
        return builder.inttoptr(address, kind.as_pointer())

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row_bytes, panel, steps, sums, sum_bytes, highest = arguments
        start = builder.load(pointer(builder, panel, vector), align=4)
        totals = [cgutils.alloca_once_value(builder, start) for _ in range(_INSTRUCTIONS.rows)]
        ahead = builder.add(rows, builder.mul(row_bytes, _LONG(32)))
        with cgutils.for_range(builder, steps) as loop:
            line = pointer(builder, builder.add(ahead, builder.mul(loop.index, _LONG(_CACHE_LINE_BYTES))), _BYTE)
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), line, _INT(0), _INT(3), _INT(1))
            step = builder.mul(builder.add(loop.index, _LONG(1)), _LONG(4 * _INSTRUCTIONS.lanes))
            queries = builder.load(pointer(builder, builder.add(panel, step), vector), align=4)
            address = builder.add(rows, builder.mul(loop.index, _LONG(4)))
            for total in totals:
                four = builder.load(pointer(builder, address, _INT), align=1)
                repeated = builder.shuffle_vector(builder.insert_element(undefined, four, _INT(0)), undefined, zeros)
                builder.store(_INSTRUCTIONS.add(builder, builder.load(total), repeated, queries), total)
                address = builder.add(address, row_bytes)
        row_sums = [builder.load(total) for total in totals]
        for row_sum in row_sums:
            builder.store(row_sum, pointer(builder, sums, vector), align=4)
            sums = builder.add(sums, sum_bytes)
        largest = reduce(lambda left, right: builder.select(builder.icmp_signed(">", left, right), left, right), row_sums)
        builder.store(largest, pointer(builder, highest, vector), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


_tile: Any = intrinsic(_write_tile)


@compile_loop
def pairs_above(raw, min_raw, group_rows, n_rows, rows, query_ids, values):
    """Count the scores that reach the least score, and write them with their rows and queries while there is room."""
    n_queries, count, room = min_raw.shape[1], 0, len(rows)
    for row in range(n_rows):
        for first in range(0, n_queries, _COMPARED_SCORES):
            scores = raw[row, first : min(first + _COMPARED_SCORES, n_queries)]
            floors = min_raw[row // group_rows, first : first + len(scores)]
            if _count_above(scores, floors):
                for query in range(len(scores)):
                    if scores[query] >= floors[query]:
                        if count < room:
                            rows[count], query_ids[count], values[count] = row, first + query, scores[query]
                        count += 1
        if count > room:
            break
    return count


@compile_loop
def _count_above(scores, floors):
    """Scores that reach their floor, counted without a branch, so that many are compared at once."""
    count = np.int32(0)
    for i in range(len(scores)):
        count += np.int32(scores[i] >= floors[i])
    return count


@compile_loop
def pairs_above_bfloat16(raw, min_raw, group_rows, n_rows, rows, query_ids, values):
    """Count and write the scores that reach the least score, like `pairs_above`, from the bits of bfloat16 scores."""
    bits = np.zeros((1, min_raw.shape[1]), np.uint32)
    wide, count = bits.view(np.float32), 0
    for row in range(n_rows):
        for i in range(bits.shape[1]):
            bits[0, i] = np.uint32(raw[row, i]) << np.uint32(16)
        group = row // group_rows
        n_more = pairs_above(wide, min_raw[group : group + 1], 1, 1, rows[count:], query_ids[count:], values[count:])
        rows[count : count + n_more] = row
        count += n_more
        if count > len(rows):
            break
    return count


@compile_loop
def fused_pairs_above(codes, panels, min_raw, n_rows, rows, query_ids, values):
    """Count and write the products of codes that reach the least score, like `pairs_above`, but multiply tile by tile."""
    n_queries, count, room = min_raw.shape[1], 0, len(rows)
    sums, highest = np.empty((_TILE_ROWS, len(panels) * LANES), np.int32), np.empty(len(panels) * LANES, np.int32)
    for first in range(0, n_rows, _TILE_ROWS):
        _multiply_tile(codes[first : first + _TILE_ROWS], panels, sums, highest)
        floors = min_raw[first // GROUP_ROWS : first // GROUP_ROWS + 1]
        if _count_above(highest[:n_queries], floors[0]):
            tile_rows = min(_TILE_ROWS, n_rows - first)
            n_more = pairs_above(sums, floors, GROUP_ROWS, tile_rows, rows[count:], query_ids[count:], values[count:])
            rows[count : count + n_more] += first
            count += n_more
        if count > room:
            break
    return count


@compile_loop
def _multiply_tile(codes, panels, sums, highest):
    steps, panel_bytes, row_bytes, sum_bytes = panels.shape[1] - 1, panels.strides[0], codes.strides[0], sums.strides[0]
    for panel in range(len(panels)):
        start, column = panels.ctypes.data + panel * panel_bytes, 4 * LANES * panel
        _tile(codes.ctypes.data, row_bytes, start, steps, sums.ctypes.data + column, sum_bytes, highest.ctypes.data + column)


@compile_loop
def code_products(codes, panels, sums):
    """Write the products of codes with packed queries to `sums`."""
    highest = np.empty(sums.shape[1], np.int32)
    for first in range(0, len(codes), _TILE_ROWS):
        _multiply_tile(codes[first : first + _TILE_ROWS], panels, sums[first : first + _TILE_ROWS], highest)


@compile_loop
def encode_rows(rows, codes, scale, code_norm, residual_norm, mean, shift):
    """Write codes, scales and lengths of groups of rows, less their mean."""
    centered = np.empty(rows.shape[1:], np.float32)
    for group in range(len(rows)):
        longest, largest, farthest = np.float32(0), np.float32(1e-30), np.float32(0)
        for row in range(len(centered)):
            longest = max(longest, _center(rows[group, row], mean, centered[row]))
            largest = max(largest, _largest_size(centered[row]))
        scale[group] = largest / np.float32(127)
        for row in range(len(centered)):
            row_codes = codes[group, row, : len(mean)]
            _round(centered[row], np.float32(1) / scale[group], np.int32(shift), row_codes)
            residual = _squared_residual(centered[row], np.float32(1) / scale[group], np.int32(shift), row_codes)
            farthest = max(farthest, residual)
        code_norm[group], residual_norm[group] = np.sqrt(longest), np.sqrt(farthest)


@compile_loop
def _center(row, mean, centered):
    squares = np.float32(0)
    for i in range(len(mean)):
        centered[i] = row[i] - mean[i]
        squares += centered[i] * centered[i]
    return squares


@compile_loop
def _largest_size(numbers):
    largest = np.float32(0)
    for i in range(len(numbers)):
        size = abs(numbers[i])
        largest = size if size > largest else largest
    return largest


@compile_loop
def _round(numbers, inverse, shift, codes):
    for i in range(len(numbers)):
        # A conversion to int truncates toward zero, so 127 is added to make the number positive, and subtracted again.
        codes[i] = np.int32(numbers[i] * inverse + np.float32(127.5)) - np.int32(127) + shift


@compile_loop
def _squared_residual(numbers, inverse, shift, codes):
    squares = np.float32(0)
    for i in range(len(numbers)):
        residual = numbers[i] * inverse - np.float32(np.int32(codes[i]) - shift)
        squares += residual * residual
    return squares
