"""The nearest other words of the tokens of a run."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_latentlens.corpus.words import words_of_tokens
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.index.word_search import WordSearchResult
from tl_latentlens.model.hook_points import forward_order

_FIRST_SHARE_OF_LAYERS = 0.2  # In the layers before it, lists of other words tell the sense of a word no better than chance.


def own_words(
    ids: Int[np.ndarray, "batch pos"],
    bytes_of: Mapping[int, bytes],
    is_special: Bool[np.ndarray, "batch pos"],
    decoded: Bool[np.ndarray, "batch pos"],
) -> list[str]:
    """The whole word that each decoded token belongs to, in reading order; empty for punctuation and special tokens.

    Args:
        ids: The tokens of the input.
        bytes_of: The bytes of the text of each, which may be parts of characters.
        is_special: True at tokens that are no text.
        decoded: True at the tokens that are decoded.
    """
    words = []
    for text_ids, special, is_decoded in zip(ids.tolist(), is_special.tolist(), decoded, strict=True):
        token_bytes = [b"" if skip else bytes_of[i] for i, skip in zip(text_ids, special, strict=True)]
        of_text = words_of_tokens([part.decode("utf-8", "replace") for part in token_bytes], token_bytes)
        words += [of_text[pos] for pos in np.flatnonzero(is_decoded).tolist()]
    return words


def other_words(
    vectors: Float[Tensor, "cells d"],
    hook_name: str,
    index: ContextualIndex,
    n_words: int,
    words: list[str] | None,
    is_visual: Bool[np.ndarray, " cells"],
    *,
    calibrate: bool,
) -> WordSearchResult:
    """The nearest words of each decoded token of a hook name that are not its own.

    Args:
        vectors: The activations.
        hook_name: The index's name for the hook name that they come from, or their own where it does not hold it.
        index: The rows.
        n_words: Most words of each.
        words: The word that each token belongs to, empty for what has none; None where the run's tokens were not known.
        is_visual: True at visual tokens, which have no word of their own.
        calibrate: Add the chance of each.
    """
    is_read = np.ones(len(vectors), bool)
    if words is not None:
        is_read = is_visual | _have_words(words, hook_name, index)
    unlike = None
    if words is not None:
        unlike = [None if visual else word for word, visual, read in zip(words, is_visual, is_read, strict=True) if read]
    at = torch.from_numpy(np.flatnonzero(is_read)).to(vectors.device)
    query_hook_name = hook_name if hook_name in index.hook_names else None
    found = index.search_words(vectors[at], n_words, query_hook_name=query_hook_name, unlike=unlike, calibrate=calibrate)
    place = torch.full((len(vectors),), len(at), device=index.device)  # The last place holds no words.
    place[at.to(index.device)] = torch.arange(len(at), device=index.device)
    return replace(
        found,
        similarities=_with_none(found.similarities, torch.nan)[place],
        rows=_with_none(found.rows, -1)[place],
        hook_ids=_with_none(found.hook_ids, -1)[place],
        chances=None if found.chances is None else _with_none(found.chances, torch.nan)[place],
    )


def words_around(
    vectors: Float[Tensor, "cells d"], hook_name: str, index: ContextualIndex, words: list[str]
) -> list[list[str]]:
    """The words around the nearest uses of each decoded token of a hook name; see `other_words`."""
    has_word = np.flatnonzero(_have_words(words, hook_name, index)).tolist()
    found = index.words_around(vectors[has_word], hook_name, [words[i] for i in has_word])
    around: list[list[str]] = [[] for _ in words]
    for i, near in zip(has_word, found, strict=True):
        around[i] = near
    return around


def _have_words(words: list[str], hook_name: str, index: ContextualIndex) -> Bool[np.ndarray, " cells"]:
    """True for tokens of words, in layers that are deep enough."""
    is_late = forward_order(hook_name)[0] >= _FIRST_SHARE_OF_LAYERS * index.model_info.n_layers
    return is_late & np.array([any(sign.isalpha() for sign in word) for word in words], bool)


def _with_none(values: Shaped[Tensor, "n k"], missing: float | int) -> Shaped[Tensor, "n+1 k"]:
    """Values of each query, and after them those of a query without any."""
    return torch.nn.functional.pad(values, (0, 0, 0, 1), value=missing)
