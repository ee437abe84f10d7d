"""Products of bytes in small tiles, by the instructions that processors have for them, written into numba's loops.

A tile holds the sums of some rows with some queries in registers; at each step four bytes of each are multiplied and added.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
        lanes: Sums in a register.
        wide: Registers of queries in a tile that is wide; it reads less for each product.
        sums: Registers of sums in a tile.
        levels: Most that a signed byte may be, so that no sum of products is cut off on the way; 0: there are no instructions.
        add: Adds the products of four unsigned bytes with four signed ones to each lane of the sums.
    """

    lanes: int
    wide: int
    sums: int
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
        return Instructions(16, 4, 16, 127, _by_avx512_vnni)
    if "+avxvnni" in features:
        return Instructions(8, 2, 8, 127, _by_avx_vnni)
    return Instructions(8, 2, 8, 64 if "+avx2" in features else 0, _by_avx2)


INSTRUCTIONS = _of_processor()


def _tile(_: Any, registers: Any, rows: Any, row_bytes: Any, panel: Any, steps: Any, out: Any, out_bytes: Any) -> Any:
    """Sums of products of a tile's rows and queries; asks memory for the bytes of the rows that come 32 rows on.

    Args:
        registers: Of queries; a literal.
        rows: Address of the first row's bytes, unsigned.
        row_bytes: From a row to the next.
        panel: Address of what sums start with, one for each query, then of four signed bytes of each query for every step.
        steps: How many times four bytes there are.
        out: Address of the first row's sums, int32.
        out_bytes: From a row's sums to the next row's.
    """
    lanes, width, add = INSTRUCTIONS.lanes, registers.literal_value, INSTRUCTIONS.add
    height = INSTRUCTIONS.sums // width
    vector = ir.VectorType(_INT, lanes)

    def at(builder: Any, address: Any, kind: Any) -> Any:
        return builder.inttoptr(address, kind.as_pointer())

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, rows, row_bytes, panel, steps, out, out_bytes = arguments

        def vectors_at(address: Any) -> list[Any]:
            places = [builder.add(address, _LONG(4 * lanes * place)) for place in range(width)]
            return [builder.load(at(builder, place, vector), align=4) for place in places]

        first = vectors_at(panel)
        sums = [[cgutils.alloca_once_value(builder, start) for start in first] for _ in range(height)]
        ahead = builder.add(rows, builder.mul(row_bytes, _LONG(32)))
        with cgutils.for_range(builder, steps) as loop:
            line = at(builder, builder.add(ahead, builder.mul(loop.index, _LONG(_LINE))), _BYTE)
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), line, _INT(0), _INT(3), _INT(1))
            step = builder.add(loop.index, _LONG(1))
            queries = vectors_at(builder.add(panel, builder.mul(step, _LONG(4 * lanes * width))))
            place = builder.add(rows, builder.mul(loop.index, _LONG(4)))
            for row in sums:
                four = builder.load(at(builder, place, _INT), align=1)
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), four, _INT(0))
                every = builder.shuffle_vector(one, one, ir.Constant(vector, None))
                for total, query in zip(row, queries, strict=True):
                    builder.store(add(builder, builder.load(total), every, query), total)
                place = builder.add(place, row_bytes)
        for row in sums:
            for place, total in enumerate(row):
                address = builder.add(out, _LONG(4 * lanes * place))
                builder.store(builder.load(total), at(builder, address, vector), align=4)
            out = builder.add(out, out_bytes)
        return context.get_dummy_value()

    return types.void(registers, *[types.intp] * 6), generate


tile: Any = intrinsic(prefer_literal=True)(_tile)
