"""What a cache of keys and values says of the tokens that were run before: how many there are, and whether they are the same.

A cache is TransformerLens' own, one of transformers, or a tuple of a pair of tensors for each layer.
"""

import re
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.model.hook_points import forward_order

_BEFORE_ATTENTION = re.compile(
    r"blocks\.0\.(hook_resid_pre|hook_in|ln1\..*|hook_\w*_?in(put)?|attn\.(hook_[qkv]|hook_in|[qkv]\..*))"
)


def n_cached_tokens(cache: Any, n_layers: int, pos: int, hook_name: str) -> int | None:
    """How many tokens the cache held when the running forward pass began; None where the cache does not say.

    Each layer adds the keys of the running pass to its own part of the cache, so the hook name tells which have done so.

    Args:
        cache: The cache that the forward pass was given.
        n_layers: The model's number of layers.
        pos: The number of tokens in the running pass.
        hook_name: The hook point that has just fired.
    """
    lengths = _lengths(cache)
    if lengths is None or not lengths or len(lengths) < n_layers:
        return None if lengths is None else 0  # transformers adds the parts of the layers in the first pass
    if min(lengths) < max(lengths):
        return min(lengths)
    block = forward_order(hook_name)[0]
    is_last = block >= n_layers - 1 and not (n_layers == 1 and _BEFORE_ATTENTION.fullmatch(hook_name))
    return max(0, lengths[0] - pos) if is_last else lengths[0]


def is_empty(cache: Any) -> bool:
    """True for a cache that holds no token of any layer; False where it does not say."""
    lengths = _lengths(cache)
    return lengths is not None and not any(lengths)


def first_keys(cache: Any, n_tokens: int) -> Float[Tensor, "batch pos d_head"] | None:
    """The first layer's keys of one head for the first tokens in the cache; None where the cache does not hold them all.

    They depend on the tokens and their positions alone, so two rows with the same keys have the same tokens.
    """
    first = _parts(cache)[:1]
    keys = first[0] if first else None
    if not isinstance(keys, Tensor) or keys.ndim != 4:
        return None
    of_head = keys[:, :, 0] if hasattr(cache, "entries") else keys[:, 0]
    return of_head[:, :n_tokens] if of_head.shape[1] >= n_tokens else None


def same_rows(keys: Float[Tensor, "batch pos d"], earlier: Float[Tensor, "rows pos d"]) -> bool:
    """True where each row's keys are those of the same row earlier."""
    return keys.shape == earlier.shape and torch.equal(keys, earlier.to(keys))


def rows_among(keys: Float[Tensor, "batch pos d"], earlier: Float[Tensor, "rows pos d"]) -> bool:
    """True where each row's keys are those of some row earlier: rows were reordered, repeated or dropped."""
    if keys.shape[1:] != earlier.shape[1:]:
        return False
    flat, flat_earlier = keys.flatten(1), earlier.to(keys).flatten(1)
    return all(bool((flat_earlier == row).all(1).any()) for row in flat)


def _parts(cache: Any) -> list[Any]:
    """The keys of each layer, as the cache holds them; empty where it has none or is of another kind."""
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache, "entries"):
        return [entry.past_keys for entry in cache.entries]
    if hasattr(cache, "layers"):
        return [layer.keys for layer in cache.layers if hasattr(layer, "keys")]
    return [layer[0] for layer in cache] if isinstance(cache, tuple | list) else []


def _lengths(cache: Any) -> list[int] | None:
    """The number of tokens that each layer's part holds; None for a cache of another kind."""
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache, "entries"):
        return [int(entry.past_keys.shape[1]) for entry in cache.entries]
    if hasattr(cache, "layers") and all(hasattr(layer, "keys") for layer in cache.layers):
        return [int(cache.get_seq_length(layer)) for layer in range(len(cache.layers))]
    if isinstance(cache, tuple | list) and all(isinstance(part, Tensor) for part in _parts(cache)):
        return [int(keys.shape[-2]) for keys in _parts(cache)]
    return None
