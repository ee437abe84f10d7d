"""Kernels of a CPU search, compiled by numba (extra "fast"): they do what torch's operators do, in one pass over the scores.

torch splits each operator among threads that wait for one another. Where other processes take a core, a search of many small
operators is mostly that wait. Products of bytes are compared with the threshold where they are made, 16 rows at a time, and are
never all in memory; other products stay with torch. The loops are in `cpu_loops` and `cpu_dots`; here
their work is split among threads.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Integer, UInt8
from torch import Tensor

from tl_latentlens.search import cpu_dots, cpu_loops
from tl_latentlens.search.chunks import GROUP_ROWS
from tl_latentlens.search.cpu_loops import LANES, MAX_QUERY_CODE
from tl_latentlens.search.error_bounds import RawPairs
from tl_latentlens.search.threads import in_threads

__all__ = ["MAX_QUERY_CODE", "code_products", "dot_products", "encode_rows", "fused_pairs_above", "pack_queries", "pairs_above"]

_MIN_NUMBERS_PER_THREAD = 2**17  # Less work than this is not worth another thread.


def pairs_above(
    raw: Tensor, min_raw: Float[Tensor, "groups q"], group_rows: int, n_rows: int, max_pairs: int
) -> RawPairs | None:
    """Rows and queries whose raw score reaches the least one, row by row; None where there are more than `max_pairs`.

    Args:
        raw: Scores [rows, columns] on the CPU, int32, float32 or bfloat16; columns past the queries are padding.
        min_raw: The least score for each group of rows.
        group_rows: Rows in a group.
        n_rows: Rows of `raw` that are no padding.
        max_pairs: Pairs to make room for.
    """
    loop = cpu_loops.pairs_above_bfloat16 if raw.dtype == torch.bfloat16 else cpu_loops.pairs_above
    scores, floors = _as_array(raw), min_raw.numpy()

    def select(first: int, last: int, *outputs: np.ndarray) -> int:
        group_floors = floors if len(floors) == 1 else floors[first // group_rows :]
        return loop(scores[first:], group_floors, group_rows, last - first, *outputs)

    unsplit_rows, n_queries = 1 if len(floors) == 1 else group_rows, floors.shape[1]
    return _select_in_threads(select, n_rows, unsplit_rows, n_queries, n_rows * n_queries, max_pairs, raw.dtype)


def fused_pairs_above(
    codes: UInt8[Tensor, "rows d"],
    packed_queries: Int32[Tensor, "panels steps lanes"],
    min_raw: Float[Tensor, "groups q"],
    n_rows: int,
    max_pairs: int,
) -> RawPairs | None:
    """Rows and queries whose product reaches the least score, like `pairs_above`; 16 rows are multiplied and compared at once.

    Args:
        codes: Whole groups of 16 rows.
        packed_queries: See `pack_queries`.
        min_raw: The least score for each group of rows.
        n_rows: Rows of `codes` that are no padding.
        max_pairs: Pairs to make room for.
    """
    rows, panels, floors = codes.numpy(), packed_queries.numpy(), min_raw.numpy()

    def select(first: int, last: int, *outputs: np.ndarray) -> int:
        return cpu_loops.fused_pairs_above(rows[first:], panels, floors[first // GROUP_ROWS :], last - first, *outputs)

    n_numbers = n_rows * codes.shape[1] * len(packed_queries)
    return _select_in_threads(select, n_rows, GROUP_ROWS, floors.shape[1], n_numbers, max_pairs, torch.int32)


def _select_in_threads(
    select: Callable[..., int],
    n_rows: int,
    unsplit_rows: int,
    n_queries: int,
    n_numbers: int,
    max_pairs: int,
    raw_dtype: torch.dtype,
) -> RawPairs | None:
    """Pairs from several threads: `select(first, last, rows, query_ids, raw)` fills the last three for some rows, and counts.

    `unsplit_rows` rows stay in one thread; `n_numbers` is the amount of work.
    """
    raw_dtype = torch.int32 if raw_dtype == torch.int32 else torch.float32
    rows_per_thread = -(-n_rows // _n_threads(n_numbers) // unsplit_rows) * unsplit_rows
    room = min(max_pairs, rows_per_thread * n_queries)

    def select_from(first: int) -> tuple[int, int, tuple[Tensor, ...]]:
        outputs = tuple(torch.empty(room, dtype=dtype) for dtype in (torch.int32, torch.int32, raw_dtype))
        n_pairs = select(first, min(first + rows_per_thread, n_rows), *(output.numpy() for output in outputs))
        return first, n_pairs, outputs

    selected = in_threads(select_from, range(0, n_rows, rows_per_thread))
    if sum(n_pairs for _, n_pairs, _ in selected) > max_pairs:
        return None
    pairs = [(first + rows[:n], query_ids[:n], raw[:n]) for first, n, (rows, query_ids, raw) in selected]
    rows, query_ids, raw = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return RawPairs(rows.long(), query_ids.long(), raw)


def pack_queries(queries: Float[Tensor, "q d"]) -> Int32[Tensor, "panels steps lanes"]:
    """Codes of queries as tiles read them: the numbers that sums start with, then four bytes of each query at every step.

    Args:
        queries: Whole numbers from -MAX_QUERY_CODE to MAX_QUERY_CODE; d is a multiple of 4.
    """
    signed = torch.nn.functional.pad(queries, (0, 0, 0, -len(queries) % LANES)).to(torch.int8)
    start = signed.sum(-1, dtype=torch.int32).mul_(-128)  # rows are unsigned: 128 was added to their codes
    fours = signed.view(torch.int32).view(-1, LANES, queries.shape[1] // 4).transpose(1, 2)
    return torch.cat([start.view(-1, 1, LANES), fours], 1)


def code_products(
    codes: UInt8[Tensor, "rows d"],
    packed_queries: Int32[Tensor, "panels steps lanes"],
    out: Int32[Tensor, "rows columns"],
) -> None:
    """Write the products of unsigned bytes, less 128, with packed queries to `out`.

    Args:
        codes: Whole groups of 16 rows.
        packed_queries: See `pack_queries`.
        out: As many columns as all panels are wide.
    """
    panels, groups = packed_queries.numpy(), (codes.unflatten(0, (-1, GROUP_ROWS)), out.unflatten(0, (-1, GROUP_ROWS)))

    def multiply(code_groups: np.ndarray, sum_groups: np.ndarray) -> None:
        cpu_loops.code_products(
            code_groups.reshape(-1, code_groups.shape[-1]), panels, sum_groups.reshape(-1, sum_groups.shape[-1])
        )

    _split_among_threads(multiply, codes.numel() * len(packed_queries), *groups)


def encode_rows(
    rows: Float[Tensor, "groups group d"],
    mean: Float[Tensor, " d"],
    codes: Integer[Tensor, "groups group wide"],
    scale: Float[Tensor, " groups"],
    code_norm: Float[Tensor, " groups"],
    residual_norm: Float[Tensor, " groups"],
) -> None:
    """Round rows less their mean to bytes, `row = mean + scale * (code + residual)`; fills the last four arguments.

    Args:
        rows: float32.
        mean: Subtracted from every row.
        codes: -127 to 127, plus 128 where they are unsigned.
        scale: Scale of each group.
        code_norm: The largest length of a group's rows less the mean.
        residual_norm: The largest length of a group's residuals.
    """
    shift = 128 if codes.dtype == torch.uint8 else 0
    outputs = (codes, scale, code_norm, residual_norm)
    _split_among_threads(lambda *arrays: cpu_loops.encode_rows(*arrays, mean.numpy(), shift), rows.numel(), rows, *outputs)


def dot_products(
    vectors: Float[Tensor, "n d"],
    queries: Float[Tensor, "q d"],
    row_ids: Int[Tensor, " pairs"],
    query_ids: Int[Tensor, " pairs"],
    dtype: torch.dtype,
) -> Float[Tensor, " pairs"]:
    """Dot products of pairs of a row and a query, summed in a given precision; equal rows give equal bits.

    Args:
        vectors: On the CPU, float16, bfloat16 or float32.
        queries: float32.
        row_ids: Row of each pair.
        query_ids: Query of each pair.
        dtype: torch.float32 or torch.float64.
    """
    loops = {
        torch.float16: cpu_dots.dots_float16,
        torch.bfloat16: cpu_dots.dots_bfloat16,
        torch.float32: cpu_dots.dots_float32,
    }
    loop, stored, wide_queries = loops[vectors.dtype], _as_array(vectors), queries.to(dtype).numpy()
    dots = torch.empty(len(row_ids), dtype=dtype)
    n_numbers = len(row_ids) * vectors.shape[1]
    _split_among_threads(lambda *pairs: loop(stored, wide_queries, *pairs), n_numbers, row_ids, query_ids, dots)
    return dots


def _split_among_threads(loop: Callable[..., Any], n_numbers: int, *tensors: Tensor) -> None:
    """Call a loop with slices of the tensors, as many as there are threads where the work is worth that."""
    n_threads = _n_threads(n_numbers)
    slices = zip(*([part.numpy() for part in tensor.tensor_split(n_threads)] for tensor in tensors), strict=True)
    in_threads(lambda arrays: loop(*arrays), slices)


def _n_threads(n_numbers: int) -> int:
    return max(1, min(torch.get_num_threads(), n_numbers // _MIN_NUMBERS_PER_THREAD))


def _as_array(tensor: Tensor) -> np.ndarray:
    """The same memory; half precision, which numba knows on GPUs alone, as its bits."""
    return (tensor.view(torch.uint16) if tensor.itemsize == 2 else tensor).numpy()
