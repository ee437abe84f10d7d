"""Directions that are no activations: steering vectors, differences of means, probes, decoder rows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index import ContextualIndex
from tl_latentlens.results import DirectionResult
from tl_latentlens.search import as_tensor


def decode_directions(
    directions: Float[Tensor, "n d"] | np.ndarray,
    index: ContextualIndex,
    *,
    top_k: int = 10,
    hook_name: str | Sequence[str] | None = None,
    ids: Sequence[int] | None = None,
) -> DirectionResult:
    """Nearest contextual tokens of each direction and of its opposite.

    Args:
        directions: [n, d], or one of width d; of any length but zero. Directions are never centred.
        index: What to decode against.
        top_k: Neighbors of each sign.
        hook_name: Search only this hook name (or these); None: all of that width.
        ids: What the directions are called in the result; None: 0 to n - 1.

    Raises:
        InvalidInputError: A wrong shape or width, NaN, inf or zero.
    """
    tensor = as_tensor(directions)
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2:
        raise InvalidInputError(f"got directions of shape {tuple(tensor.shape)}; expected [n, d] or [d]")
    positive = index.search(tensor, top_k, hook_name)
    negative = index.search(-tensor, top_k, hook_name)
    return DirectionResult(range(len(tensor)) if ids is None else list(ids), positive, negative)
