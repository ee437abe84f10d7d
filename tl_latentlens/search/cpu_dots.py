"""Dot products of pairs of a stored row and a query, in loops that numba compiles: each row is read once, in its own type."""

import numpy as np

from tl_latentlens.search.compile_loop import compile_loop

_PREFETCHED_ROWS = 2  # Rows that are on their way from memory while one is multiplied.
_ROW_STRIDE = 32  # Numbers of a row in a cache line of 64 bytes, in half precision.


@compile_loop
def _widen_bfloat16(half, bits):
    for i in range(len(bits)):
        bits[i] = np.uint32(half[i]) << np.uint32(16)


@compile_loop
def _widen_float16(half, bits, wide):
    for i in range(len(bits)):
        exponent_and_fraction = np.uint32(half[i] & 0x7FFF) << np.uint32(13)
        bits[i] = exponent_and_fraction + np.uint32(112 << 23) | np.uint32(half[i] & 0x8000) << np.uint32(16)
    floats = bits.view(np.float32)
    for i in range(len(bits)):
        subnormal = np.float32(np.int32(half[i] & 0x3FF)) * np.float32(2.0**-24)
        subnormal = -subnormal if half[i] & 0x8000 else subnormal
        wide[i] = floats[i] if half[i] & 0x7C00 else subnormal


@compile_loop
def _dot(wide, query):
    total = query.dtype.type(0)
    for i in range(len(query)):
        total += wide[i] * query[i]
    return total


@compile_loop
def _prefetch(row):
    """Read a row, so that memory brings it while others are multiplied; the sum only keeps the reads from being dropped."""
    total = row[0]
    for i in range(0, len(row), _ROW_STRIDE):
        total += row[i]
    return total


@compile_loop
def dots_float32(vectors, queries, row_ids, query_ids, dots):
    """Write dot products of pairs to `dots`."""
    prefetched, last = vectors[0, 0], len(row_ids) - 1
    for pair in range(len(row_ids)):
        prefetched += _prefetch(vectors[row_ids[min(pair + _PREFETCHED_ROWS, last)]])
        dots[pair] = _dot(vectors[row_ids[pair]], queries[query_ids[pair]])
    return prefetched


@compile_loop
def dots_bfloat16(vectors, queries, row_ids, query_ids, dots):
    """Write dot products of pairs to `dots`, like `dots_float32`, from the bits of bfloat16 vectors."""
    bits, prefetched, last = np.empty(vectors.shape[1], np.uint32), vectors[0, 0], len(row_ids) - 1
    for pair in range(len(row_ids)):
        prefetched += _prefetch(vectors[row_ids[min(pair + _PREFETCHED_ROWS, last)]])
        _widen_bfloat16(vectors[row_ids[pair]], bits)
        dots[pair] = _dot(bits.view(np.float32), queries[query_ids[pair]])
    return prefetched


@compile_loop
def dots_float16(vectors, queries, row_ids, query_ids, dots):
    """Write dot products of pairs to `dots`, like `dots_float32`, from the bits of float16 vectors."""
    bits, wide = np.empty(vectors.shape[1], np.uint32), np.empty(vectors.shape[1], np.float32)
    prefetched, last = vectors[0, 0], len(row_ids) - 1
    for pair in range(len(row_ids)):
        prefetched += _prefetch(vectors[row_ids[min(pair + _PREFETCHED_ROWS, last)]])
        _widen_float16(vectors[row_ids[pair]], bits, wide)
        dots[pair] = _dot(wide, queries[query_ids[pair]])
    return prefetched
