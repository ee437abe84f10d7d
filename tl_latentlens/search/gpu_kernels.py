"""Kernels of a GPU search, in Triton, which comes with torch there; torch alone does the same with more memory traffic."""

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int
from torch import Tensor

_DOT_BLOCK = 1024  # Numbers of a row that are read together, where pairs are scored.
_PRODUCT_ROWS, _PRODUCT_BLOCK = 16, 128  # Rows and numbers that are read together, where all rows are.


def dot_products(
    vectors: Float[Tensor, "n d"],
    queries: Float[Tensor, "q d"],
    row_ids: Int[Tensor, " pairs"],
    query_ids: Int[Tensor, " pairs"],
    dtype: torch.dtype,
) -> Float[Tensor, " pairs"]:
    """Dot products of pairs of a row and a query, like `cpu_kernels.dot_products`, for vectors on a GPU."""
    dots = torch.empty(len(row_ids), dtype=dtype, device=vectors.device)
    row_ids, query_ids = row_ids.contiguous(), query_ids.contiguous()
    if len(row_ids):
        block = min(_DOT_BLOCK, triton.next_power_of_2(vectors.shape[1]))
        wide = tl.float64 if dtype == torch.float64 else tl.float32
        strides = (*vectors.stride(), *queries.stride())
        with torch.cuda.device_of(vectors):
            launch = _dot_products[(len(row_ids),)]  # pyright: ignore[reportIndexIssue]
            launch(vectors, queries, row_ids, query_ids, dots, *strides, vectors.shape[1], block, wide)
    return dots


def products_with_one_query(
    vectors: Float[Tensor, "n d"], query: Float[Tensor, "1 d"], length: int
) -> Float[Tensor, "length 1"]:
    """Dot products of all rows with one query, at the speed of reading them; multiplied and summed in float32.

    They are followed by -inf up to a length of at least n.
    """
    products = torch.empty((length, 1), dtype=torch.float32, device=vectors.device)
    strides, sizes = vectors.stride(), (vectors.shape[1], _PRODUCT_ROWS, _PRODUCT_BLOCK)
    with torch.cuda.device_of(vectors):
        launch = _products[(triton.cdiv(length, _PRODUCT_ROWS),)]  # pyright: ignore[reportIndexIssue]
        launch(vectors, query.contiguous(), products, len(vectors), length, *strides, *sizes)
    return products


@triton.jit
def _products(
    vectors,
    query,
    products,
    n,
    length,
    row_step,
    number_step,
    d: tl.constexpr,
    rows_per_program: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * rows_per_program + tl.arange(0, rows_per_program)
    is_real = row < n
    total = tl.zeros([rows_per_program, block], dtype=tl.float32)
    for first in range(0, d, block):
        column = first + tl.arange(0, block)
        is_inside = column < d
        places = vectors + row[:, None] * row_step + column[None, :] * number_step
        numbers = tl.load(places, mask=is_real[:, None] & is_inside[None, :], other=0.0).to(tl.float32)
        total += numbers * tl.load(query + column, mask=is_inside, other=0.0)[None, :]
    sums = tl.where(is_real, tl.sum(total, axis=1), float("-inf"))
    tl.store(products + row, sums, mask=row < length)


@triton.jit
def _dot_products(
    vectors,
    queries,
    row_ids,
    query_ids,
    dots,
    row_step,
    number_step,
    query_step,
    query_number_step,
    d: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    row = vectors + tl.load(row_ids + pair) * row_step
    query = queries + tl.load(query_ids + pair) * query_step
    total = tl.zeros([block], dtype=wide)
    for first in range(0, d, block):
        column = first + tl.arange(0, block)
        is_inside = column < d
        numbers = tl.load(row + column * number_step, mask=is_inside, other=0.0).to(wide)
        total += numbers * tl.load(query + column * query_number_step, mask=is_inside, other=0.0).to(wide)
    tl.store(dots + pair, tl.sum(total, axis=0))
