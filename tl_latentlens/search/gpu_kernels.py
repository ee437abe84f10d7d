"""Kernels of a GPU search, in Triton, which comes with torch there; torch alone does the same with more memory traffic."""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 1024  # numbers of a row that are read at once
_TILE = (16, 128)  # rows and numbers, where all rows are read


def dots(
    vectors: Float[Tensor, "n d"],
    queries: Float[Tensor, "q d"],
    rows: Int[Tensor, " pairs"],
    of: Int[Tensor, " pairs"],
    dtype: torch.dtype,
) -> Float[Tensor, " pairs"]:
    """As `compiled.dots`, for vectors on a GPU."""
    found = torch.empty(len(rows), dtype=dtype, device=vectors.device)
    rows, of = rows.contiguous(), of.contiguous()
    if len(rows):
        block = min(_BLOCK, triton.next_power_of_2(vectors.shape[1]))
        wide = tl.float64 if dtype == torch.float64 else tl.float32
        strides = (*vectors.stride(), *queries.stride())
        with torch.cuda.device_of(vectors):
            launch = _dots[(len(rows),)]  # pyright: ignore[reportIndexIssue]
            launch(vectors, queries, rows, of, found, *strides, vectors.shape[1], block, wide)
    return found


def product(vectors: Float[Tensor, "n d"], query: Float[Tensor, "1 d"], length: int) -> Float[Tensor, "length 1"]:
    """Dot products of all rows with one query, at the speed of reading them; multiplied and summed in float32.

    They are followed by -inf up to a length of at least n.
    """
    found = torch.empty((length, 1), dtype=torch.float32, device=vectors.device)
    rows, block = _TILE
    with torch.cuda.device_of(vectors):
        launch = _product[(triton.cdiv(length, rows),)]  # pyright: ignore[reportIndexIssue]
        launch(vectors, query.contiguous(), found, len(vectors), length, *vectors.stride(), vectors.shape[1], rows, block)
    return found


@triton.jit
def _product(
    vectors,
    query,
    found,
    n,
    length,
    row_step,
    number_step,
    d: tl.constexpr,
    rows_at_once: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows_at_once + tl.arange(0, rows_at_once)
    real = row < n
    total = tl.zeros([rows_at_once, block], dtype=tl.float32)
    for first in range(0, d, block):
        at = first + tl.arange(0, block)
        inside = at < d
        places = vectors + row[:, None] * row_step + at[None, :] * number_step
        numbers = tl.load(places, mask=real[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += numbers * tl.load(query + at, mask=inside, other=0.0)[None, :]
    products = tl.where(real, tl.sum(total, axis=1), float("-inf"))
    tl.store(found + row, products, mask=row < length)


@triton.jit
def _dots(
    vectors,
    queries,
    rows,
    of,
    found,
    row_step,
    number_step,
    query_step,
    part_step,
    d: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    row = vectors + tl.load(rows + pair) * row_step
    query = queries + tl.load(of + pair) * query_step
    total = tl.zeros([block], dtype=wide)
    for first in range(0, d, block):
        at = first + tl.arange(0, block)
        inside = at < d
        numbers = tl.load(row + at * number_step, mask=inside, other=0.0).to(wide)
        total += numbers * tl.load(query + at * part_step, mask=inside, other=0.0).to(wide)
    tl.store(found + pair, tl.sum(total, axis=0))
