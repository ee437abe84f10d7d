"""The nearest rows of directions that are no activations: steering vectors, differences of means, probes, decoder rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.directions.significance import comparison_direction, direction_scores, scores_table
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
    calibrate: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> DirectionResult:
    """The nearest contextual tokens of each direction and of its opposite, and whether they are near at all.

    Args:
        directions: [n, d], or one of width d. Any length but zero will do. Directions are never centered.
        index: The rows to decode against. They are centered, unless the index was made with another transform than "auto"
            (`ContextualIndex.for_directions`).
        top_k: Neighbors of each sign.
        hook_name: The hook names, or layers, to search; None: all of that width.
        ids: Names of the directions in the result; None: 0 to n - 1.
        calibrate: Also say how often random directions have neighbors as near (`DirectionResult.scores`), and decode one random
            direction alike, for comparison (`DirectionResult.random`). Where p is 0.01 or more, a direction points to nothing
            in this bank. Neighbors have the chance that a random activation is as near to them too (`Neighbor.chance`). This
            takes a search of 2,000 random directions, once for an index, its searched hook names and `top_k`.
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
    names = range(len(tensor)) if ids is None else list(ids)
    index = index.for_directions

    def decode(vectors: Float[Tensor, "n d"], of: Sequence[Any]) -> DirectionResult:
        found = [index.search(sign * vectors, top_k, hook_name, calibrate=calibrate) for sign in (1, -1)]
        scores = None
        if calibrate:
            ends = [
                direction_scores(index, sign * vectors, end, hook_name, seed=seed, progress=progress)
                for sign, end in zip((1, -1), found, strict=True)
            ]
            scores = scores_table(of, *ends)
            scores.attrs["transform"] = index.transform
        return DirectionResult(of, *found, scores=scores)

    result = decode(tensor, names)
    if not calibrate:
        return result
    searched = index.searched_hook_names(tensor, hook_name)
    random = comparison_direction(index, searched, tensor.shape[-1], seed)
    return replace(result, random=decode(random, ["random direction (for comparison)"]))
