"""Mean and standard deviation of vectors per dimension, in float64, a few rows at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_CACHED_NUMBERS = 2**17  # A core's cache holds this many numbers of 8 bytes.
_HEADS_CHUNK_NUMBERS = 2**20  # Numbers of 8 bytes that one step over the heads takes.


def mean_and_std(vectors: Float[Tensor, "rows d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Mean and standard deviation (divided by n) of each dimension, float64; zeros where there are no rows.

    Sums are of differences to the first row, so that a dimension that never changes has a deviation of exactly zero.
    """
    if not len(vectors):
        return np.zeros(vectors.shape[1]), np.zeros(vectors.shape[1])
    origin = vectors[0].double()
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for chunk in vectors.split(max(1, _CACHED_NUMBERS * torch.get_num_threads() // vectors.shape[1])):
        differences = chunk.double().sub_(origin)
        total += differences.sum(0)
        squares += differences.square_().sum(0)
    shift = total / len(vectors)
    return (origin + shift).numpy(), (squares / len(vectors) - shift**2).clamp(min=0).sqrt().numpy()


def pooled_mean_and_std(
    n_rows: Sequence[int], means: Float[np.ndarray, "parts d"], stds: Float[np.ndarray, "parts d"]
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Mean and standard deviation of the vectors of several parts, from those of each, float64."""
    shares = (np.array(n_rows) / sum(n_rows))[:, None]
    mean = (shares * means).sum(0)
    return mean, np.sqrt((shares * (stds**2 + (means - mean) ** 2)).sum(0))


def mean_and_std_of_heads(
    parts: Sequence[Float[np.ndarray, "rows d"]], n_heads: int
) -> tuple[Float[np.ndarray, "head d_head"], Float[np.ndarray, "head d_head"]]:
    """Mean and standard deviation of each head's vectors, brought to length 1, float64; vectors of zeros stay zeros."""
    d, n_rows = parts[0].shape[1], sum(map(len, parts))
    total, squares = np.zeros(d), np.zeros(d)
    step = max(1, _HEADS_CHUNK_NUMBERS // d)
    for chunk in (part[row : row + step] for part in parts for row in range(0, len(part), step)):
        heads = chunk.astype(np.float64).reshape(-1, n_heads, d // n_heads)
        lengths = np.linalg.norm(heads, axis=-1, keepdims=True)
        units = (heads / np.where(lengths > 0, lengths, 1)).reshape(-1, d)
        total += units.sum(0)
        squares += np.square(units).sum(0)
    mean = total / n_rows
    std = np.sqrt(np.maximum(squares / n_rows - mean**2, 0))
    return mean.reshape(n_heads, -1), std.reshape(n_heads, -1)
