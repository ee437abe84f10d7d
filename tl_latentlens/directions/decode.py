"""The nearest rows of directions that are no activations: steering vectors, differences of means, probes, decoder rows."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.directions.significance import direction_scores, scores_table
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
    seed: int = 0,
    progress: bool = True,
) -> DirectionResult:
    """The nearest contextual tokens of each direction and of its opposite, and, calibrated, whether they are near at all.

    Args:
        directions: [n, d], or one of width d. Any length but zero will do. Directions are never centered.
        index: The rows to decode against.
        top_k: Neighbors of each sign.
        hook_name: The hook names, or layers, to search; None: all of that width.
        ids: Names of the directions in the result; None: 0 to n - 1.
        calibrate: Also say how often random directions have neighbors as near (`DirectionResult.scores`). Where p is 0.01 or
            more, a direction points to nothing in this bank. The random directions of an index are scored once. Neighbors then
            have the chance that a random activation is as near to them too (`Neighbor.chance`).
        seed: Seed of the random directions.
        progress: Show a progress bar where the random directions take long.

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
    names = range(len(tensor)) if ids is None else list(ids)
    scores = None
    if calibrate:
        ends = [
            direction_scores(index, sign * tensor, found, hook_name, seed=seed, progress=progress)
            for sign, found in ((1, positive), (-1, negative))
        ]
        scores = scores_table(names, *ends)
    return DirectionResult(names, positive, negative, scores=scores)
