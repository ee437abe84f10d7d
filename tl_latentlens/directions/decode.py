"""The nearest rows of directions that are no activations: steering vectors, differences of means, probes, decoder rows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.search.tensors import as_tensor


def decode_directions(
    directions: Float[Tensor, "n d"] | np.ndarray,
    index: ContextualIndex,
    *,
    top_k: int = 10,
    hook_name: int | str | Sequence[int | str] | None = None,
    ids: Sequence[int] | None = None,
    calibrate: bool = False,
) -> DirectionResult:
    """The nearest contextual tokens of each direction and of its opposite.

    Args:
        directions: [n, d], or one of width d. Any length but zero will do. Directions are never centered.
        index: The rows to decode against.
        top_k: Neighbors of each sign.
        hook_name: The hook names, or layers, to search; None: all of that width.
        ids: Names of the directions in the result; None: 0 to n - 1.
        calibrate: Add the chance that a random activation is as near to each neighbor (`Neighbor.chance`). For a direction
            that the model does not use, chance explains all neighbors.

    Raises:
        InvalidInputError: A wrong shape or width, NaN, inf or zero; no index.
    """
    require_index(index)
    tensor = as_tensor(directions)
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2:
        raise InvalidInputError(f"got directions of shape {tuple(tensor.shape)}; expected [n, d] or [d]")
    positive = index.search(tensor, top_k, hook_name, calibrate=calibrate)
    negative = index.search(-tensor, top_k, hook_name, calibrate=calibrate)
    return DirectionResult(range(len(tensor)) if ids is None else list(ids), positive, negative)
