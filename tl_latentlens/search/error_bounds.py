"""Bounds on the rounding errors of scores: every roundoff constant and formula of a search.

For floats, |fl(x·y) - x·y| <= n u / (1 - n u) |x||y| with the unit roundoff u (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, section 3.1). For quantized codes the bounds follow from the Cauchy-Schwarz inequality (`codes`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Rows whose length is this near to 1 are unit vectors rounded to their type, and are used as stored.
UNIT_LENGTH_TOLERANCE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 1e-5}
MAX_UNIT_LENGTH = 1.0 + max(UNIT_LENGTH_TOLERANCE.values())
# Two similarities that round to the same float32 are nearer than this: near 1 a float32 has steps of 2^-24 to 2^-23.
FLOAT32_TIE_MARGIN = 2.0**-22
# Bounds the float32 rounding of the scales, lengths and products of quantized codes, all at most about 1.
CODE_FLOAT32_ERROR = 4e-6
# Bounds the rounding of a product of codes to bfloat16, as a share of it.
BFLOAT16_PRODUCT_ROUNDOFF = 1.01 * UNIT_ROUNDOFF[torch.bfloat16]


@dataclass(frozen=True)
class ErrorBound:
    """The bounds that a raw coarse score puts on a similarity.

    The similarity is `offset + query_scale * (scale * (raw ± row_error) ± query_error)`. `roundoff` widens the bound further.

    Attributes:
        scale: Scale of each group of 16 rows, above 0. None: 1.
        row_error: Error of the rounded rows, for each query; multiplied by the group's scale.
        query_error: Error of the rounded query and of float32; not multiplied by the group's scale. None: 0.
        query_scale: Scale of each query, above 0. None: 1.
        offset: Added to every similarity of a query. None: 0.
        roundoff: Rounding error of `raw` as a share of itself; only where `scale` is None.
    """

    scale: Float[Tensor, " groups"] | None
    row_error: Float[Tensor, " q"]
    query_error: Float[Tensor, " q"] | None = None
    query_scale: Float[Tensor, " q"] | None = None
    offset: Float[Tensor, " q"] | None = None
    roundoff: float = 0.0

    def min_raw_score(self, threshold: Float[Tensor, " q"]) -> Float[Tensor, "groups q"] | Float[Tensor, "1 q"]:
        """The least raw score of rows whose similarity can reach a threshold, for each group (or all) and query."""
        least = threshold if self.offset is None else threshold - self.offset
        least = least if self.query_scale is None else least / self.query_scale
        least = least if self.query_error is None else least - self.query_error
        if self.scale is not None:
            return torch.addr(-self.row_error.expand(len(self.scale), -1), 1 / self.scale, least)
        least = least - self.row_error
        return torch.where(least > 0, least * (1 - self.roundoff), least * (1 + self.roundoff))[None]

    def estimate(
        self, raw: Tensor, group_ids: Int[Tensor, " pairs"], query_ids: Int[Tensor, " pairs"]
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Estimated similarities of pairs, and a bound on the error of each.

        Args:
            raw: Raw score of each pair.
            group_ids: Group of 16 rows of each pair.
            query_ids: Query of each pair.
        """
        similarity = raw.float()
        error = self.row_error[query_ids] + self.roundoff * similarity.abs()
        scale = None if self.query_scale is None else self.query_scale[query_ids]
        query_error = None if self.query_error is None else self.query_error[query_ids]
        if query_error is not None and scale is not None:
            query_error = scale * query_error
        if self.scale is not None:
            scale = self.scale[group_ids] if scale is None else scale * self.scale[group_ids]
        if scale is not None:
            similarity, error = scale * similarity, scale * error
        error = error if query_error is None else error + query_error
        return (similarity if self.offset is None else self.offset[query_ids] + similarity), error


@dataclass(frozen=True)
class CoarseScores:
    """Coarse scores of a chunk of rows, the output of step 1 of a search.

    Attributes:
        first_row: Number of the chunk's first row, counted through all parts of the search.
        n_rows: Number of rows in the chunk.
        raw: Raw score of each row and query, any number type. Rows are padded to a multiple of 16; padding rows and
            columns past the queries hold arbitrary numbers.
        bound: How the raw scores bound similarities.
    """

    first_row: int
    n_rows: int
    raw: Int[Tensor, "rows columns"] | Float[Tensor, "rows columns"]
    bound: ErrorBound


class RawPairs(NamedTuple):
    """Pairs of a row and a query with their raw scores.

    Attributes:
        rows: Row of each pair, counted in its chunk.
        query_ids: Query of each pair.
        raw: Raw score of each pair.
    """

    rows: Int[Tensor, " pairs"]
    query_ids: Int[Tensor, " pairs"]
    raw: Tensor


def float32_similarity_error(d: int, row_error_gain: float) -> float:
    """Bound on the error of a similarity that is summed in float32 over d dimensions."""
    return (2.0**-23 + d * 2.0**-23) * max(MAX_UNIT_LENGTH, row_error_gain)


def untransformed_product_error(
    query_residual_norm: Float[Tensor, " q"], d: int, coarse_dtype: torch.dtype, *, rounds_rows: bool
) -> Float[Tensor, " q"]:
    """Bound on the error of products with rows as they are stored, without the rounding of the product itself.

    Args:
        query_residual_norm: Length of the difference between each query and its rounded form.
        d: Width of the vectors.
        coarse_dtype: What rows and queries are rounded to.
        rounds_rows: The rows are stored in another type than that.
    """
    row_roundoff = UNIT_ROUNDOFF[coarse_dtype] * rounds_rows
    return (query_residual_norm + (row_roundoff + 1.01 * (d + 2) * 2.0**-23)) * MAX_UNIT_LENGTH


def product_roundoff(dtype: torch.dtype) -> float:
    """Rounding error of a product that is rounded to half precision, as a share of itself; 0 in float32."""
    return 1.01 * UNIT_ROUNDOFF[dtype] * (dtype.itemsize == 2)


def transformed_product_error(
    d: int, coarse_dtype: torch.dtype, *, removes_own_mean: bool, has_penalty: bool, error_gain: float
) -> float:
    """Bound on the error of a scaled and shifted product with a query of length 1.

    Args:
        d: Width of the vectors.
        coarse_dtype: What rows and queries are rounded to.
        removes_own_mean: Rows are compared without their own mean.
        has_penalty: A hubness penalty is subtracted from the product.
        error_gain: How much longer stored rows and the center are than transformed rows.
    """
    unit_roundoff = UNIT_ROUNDOFF[coarse_dtype]
    product = 2.0**-24
    if coarse_dtype == torch.float32:
        # "high" multiplies in TF32 (2^-11) and "medium" in bfloat16, where the hardware has them.
        unit_roundoff = {"highest": 0.0, "high": 2.0**-11}.get(_float32_precision(), 2.0**-8)
    else:
        product += unit_roundoff  # the product is rounded to the same type
    if removes_own_mean:
        product += 2.0**-23  # queries have mean 0 up to rounding: a row's own mean adds next to nothing to its product
    if has_penalty:
        product += 2.0**-22  # The subtraction is rounded, and so is the penalty in float32.
    return (2 * unit_roundoff + product + d * 2.0**-23) * error_gain


def _float32_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for each backend (fp32_precision), which this getter does not sum up
        return "medium"
