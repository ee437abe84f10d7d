"""Directions that are no activations: SAE features, steering vectors, differences of means."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
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


def label_features(
    sae: Any, index: ContextualIndex, features: Sequence[int] | None = None, *, top_k: int = 10
) -> DirectionResult:
    """Decode SAE features by their decoder rows.

    Args:
        sae: An SAELens SAE (anything with `W_dec` [d_sae, d_in]), or W_dec itself.
        index: What to decode against. Where the SAE names its hook (`cfg.metadata.hook_name_out` or `hook_name`) and the
            index holds it, only that hook name is searched.
        features: Feature numbers; None: all.
        top_k: Neighbors of each sign.

    Raises:
        InvalidInputError: No decoder, a feature out of range, or another width than the index.
    """
    weight = as_tensor(getattr(sae, "W_dec", sae))
    if weight.ndim != 2:
        raise InvalidInputError(f"got a decoder of shape {tuple(weight.shape)}; expected W_dec [d_sae, d_in]")
    numbers = list(range(len(weight))) if features is None else [int(f) for f in features]
    outside = [f for f in numbers if not 0 <= f < len(weight)]
    if outside:
        raise InvalidInputError(f"got feature {outside[0]}; the SAE has features 0 to {len(weight) - 1}")
    dead = (weight[numbers] == 0).all(-1)
    if bool(dead.any()):
        first = [numbers[i] for i in torch.nonzero(dead)[:10, 0].tolist()]
        raise InvalidInputError(f"{int(dead.sum())} features have a decoder row of zeros, first {first}; leave them out")
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    written = getattr(metadata, "hook_name_out", None) or getattr(metadata, "hook_name", None)
    hook_name = written if written in index.hook_names else None
    return decode_directions(weight[numbers], index, top_k=top_k, hook_name=hook_name, ids=numbers)
