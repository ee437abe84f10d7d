"""Batches of captured vectors that are searched and read together: a search reads every row, however few its queries are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.captures import Captures
from tl_latentlens.model.heads import head_of
from tl_latentlens.model.hook_points import in_residual_stream

_MAX_VECTORS_PER_SEARCH = 4096  # more would take more memory and no less time


@dataclass(frozen=True)
class VectorBatch:
    """The decoded vectors of several hook names.

    Attributes:
        hook_names: Their hook names.
        vectors: [names, cells, d].
        query_hook_name: The hook name as which the index searches all of them; None where that makes no difference.
        is_residual: True where they are of the residual stream, which the logit and the embedding lens can read.
    """

    hook_names: list[str]
    vectors: Float[Tensor, "names cells d"]
    query_hook_name: str | None
    is_residual: bool


def vector_batches(captures: Captures, decoded: Bool[np.ndarray, "batch pos"], index: ContextualIndex) -> Iterator[VectorBatch]:
    """The captured vectors at the decoded positions, in batches of like hook names, at most 4,096 vectors at a time."""
    searchable_together: dict[Any, list[str]] = {}
    for name in captures.hook_names:
        kind = captures.kind_of_vectors(name), in_residual_stream(name), _query_hook_name(name, index)
        searchable_together.setdefault(kind, []).append(name)
    names_per_batch = max(1, _MAX_VECTORS_PER_SEARCH // max(1, int(decoded.sum())))
    for (_, is_residual, query_hook_name), names in searchable_together.items():
        for start in range(0, len(names), names_per_batch):
            batch = names[start : start + names_per_batch]
            vectors = torch.stack([captures.vectors(name, decoded) for name in batch])
            yield VectorBatch(batch, vectors, query_hook_name, is_residual)


def _query_hook_name(name: str, index: ContextualIndex) -> str | None:
    """The index's own name for the activation, where the index searches its queries otherwise than others."""
    own_name = indexed_hook_name(name, index)
    is_needed = index.centers_activations or head_of(name) is not None
    return own_name if is_needed else None


def indexed_hook_name(name: str, index: ContextualIndex) -> str | None:
    """The index's own name for an activation; None where it does not hold it."""
    name = name if name in index.hook_names else name.removesuffix(".hook_sae_input")
    return name if name in index.hook_names else None
