"""Products of bytes in small tiles, by the instructions that processors have for them, written into numba's loops.

A tile holds the sums of some rows with some queries in registers; at each step four bytes of each are multiplied and added.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_BYTE, _SHORT, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LINE = 64  # bytes that memory brings at once


@dataclass(frozen=True)
class Instructions:
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


def _of_processor() -> Instructions:
    """The best that numba compiles for here."""
    target: Any = cpu_target.target_context
    features = set(target.codegen().magic_tuple()[2].split(","))
    if "+avx512vnni" in features:
        return Instructions(16, 16, 127, _by_avx512_vnni)
    if "+avxvnni" in features:
        return Instructions(8, 8, 127, _by_avx_vnni)
    return Instructions(8, 8, 64 if "+avx2" in features else 0, _by_avx2)


INSTRUCTIONS = _of_processor()


def _tile(_: Any, rows: Any, row_bytes: Any, panel: Any, steps: Any, sums: Any, sum_bytes: Any, highest: Any) -> Any:
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
    vector = ir.VectorType(_INT, INSTRUCTIONS.lanes)
    undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(vector, None)

    def at(builder: Any, address: Any, kind: Any) -> Any:
        return builder.inttoptr(address, kind.as_pointer())

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row_bytes, panel, steps, sums, sum_bytes, highest = arguments
        start = builder.load(at(builder, panel, vector), align=4)
        totals = [cgutils.alloca_once_value(builder, start) for _ in range(INSTRUCTIONS.rows)]
        ahead = builder.add(rows, builder.mul(row_bytes, _LONG(32)))
        with cgutils.for_range(builder, steps) as loop:
            line = at(builder, builder.add(ahead, builder.mul(loop.index, _LONG(_LINE))), _BYTE)
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), line, _INT(0), _INT(3), _INT(1))
            step = builder.mul(builder.add(loop.index, _LONG(1)), _LONG(4 * INSTRUCTIONS.lanes))
            queries = builder.load(at(builder, builder.add(panel, step), vector), align=4)
            place = builder.add(rows, builder.mul(loop.index, _LONG(4)))
            for total in totals:
                four = builder.load(at(builder, place, _INT), align=1)
                every = builder.shuffle_vector(builder.insert_element(undefined, four, _INT(0)), undefined, zeros)
                builder.store(INSTRUCTIONS.add(builder, builder.load(total), every, queries), total)
                place = builder.add(place, row_bytes)
        found = [builder.load(total) for total in totals]
        for total in found:
            builder.store(total, at(builder, sums, vector), align=4)
            sums = builder.add(sums, sum_bytes)
        most = reduce(lambda one, other: builder.select(builder.icmp_signed(">", one, other), one, other), found)
        builder.store(most, at(builder, highest, vector), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


tile: Any = intrinsic(_tile)
