"""Queries as unit vectors (step 0 of a search)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.geometry import ZERO_LENGTH_SHARE
from tl_latentlens.search.tensors import as_tensor

_MAX_NUMBERS_ON_CPU = 2**16  # Queries of at most this many numbers are normalized before a GPU could have begun.


def normalize_queries(
    queries: Float[Tensor, "... d"] | np.ndarray, d: int, device: torch.device, *, remove_means: bool = False
) -> Float[Tensor, "... d"]:
    """Queries as float32 unit vectors on `device`.

    Args:
        queries: Any leading shape, of any length but zero.
        d: Width of the rows.
        device: Where the rows are searched.
        remove_means: Subtract each query's own mean over d first.

    Raises:
        InvalidInputError: Another width than `d`, or a query with NaN or inf, or of length zero; the message says where.
    """
    tensor = as_tensor(queries)
    if tensor.numel() > _MAX_NUMBERS_ON_CPU:
        tensor = tensor.to(device)
    if tensor.ndim < 1 or tensor.shape[-1] != d:
        raise InvalidInputError(
            f"got queries of shape {tuple(tensor.shape)}; expected a last dimension of {d}, the width of the bank"
        )
    exact = tensor.double()
    lengths = exact.norm(dim=-1, keepdim=True)
    if remove_means:
        exact = exact - exact.mean(-1, keepdim=True)
        centered_lengths = exact.norm(dim=-1, keepdim=True)
        has_direction = centered_lengths > ZERO_LENGTH_SHARE * lengths
        lengths = torch.where(has_direction, centered_lengths, 0 * centered_lengths)
    is_good = (lengths > 0) & (lengths < torch.inf)
    if not bool(is_good.all()):
        raise InvalidInputError(_refusal(lengths[..., 0], ~is_good[..., 0]))
    return (exact / lengths).float().to(device)


def _refusal(lengths: Float[Tensor, "..."], is_bad: Tensor) -> str:
    place = tuple(torch.nonzero(is_bad)[0].tolist())
    kind = "zero" if bool((lengths == 0)[place]) else "NaN or inf"
    where = f" at index {place}" if place else ""
    return f"{int(is_bad.sum())} of {is_bad.numel()} queries cannot be compared: the query{where} is {kind}"
