"""The run that a hook is called in: its model, its tokens, and which of them are padding or BOS."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.describe import is_model
from tl_latentlens.model.key_cache import is_empty, n_cached_tokens
from tl_latentlens.model.special_tokens import skippable_token_ids

_GENERATING_FUNCTIONS = ("generate", "generate_stream", "_generate_tokens", "_sample")
_SEARCH = re.compile(r"_?(\w*beam_search|contrastive_search|assisted_decoding)")
"""Functions of transformers that reorder, repeat or take back what they run, so that no row is one text to the end."""


@dataclass(frozen=True)
class RunContext:
    """The run that called a hook, as far as the hook can find it out.

    Attributes:
        model: The outermost TransformerLens model that is running, or None.
        tokens: Token ids that the activation belongs to, or None.
        attention_mask: The mask given to the model, or None.
        n_cached: The number of tokens before these whose keys and values the run was given; 0 for a run of its own; None where
            `generate` adds tokens and the cache does not show how many.
        cache: The cache of keys and values, or None.
        search: The name of the search that generates and does not keep the rows of the batch, or None.
        stops_early: True where the caller asked to stop at a layer.
        source: What entered the hook point. Hooks that fire in one call of a hook point have the same.
    """

    model: Any
    tokens: Int[Tensor, "batch pos"] | None
    attention_mask: Int[Tensor, "batch pos"] | None
    n_cached: int | None = 0
    cache: Any = None
    search: str | None = None
    stops_early: bool = False
    source: Tensor | None = None


@dataclass
class _Found:
    """What the frames above a hook show, the innermost first."""

    model: Any = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    cache: Any = None
    search: str | None = None
    stops_early: bool = False
    source: Tensor | None = None
    is_later_step: bool | None = None


def find_run_context(batch: int, pos: int, hook_name: str = "") -> RunContext:
    """The context of the forward pass that is calling, for an activation of these sizes at a hook name.

    TransformerLens gives a hook the activation and its HookPoint, and neither leads to the model or the tokens. They are
    arguments of the forward passes that are on the stack. Those arguments have had the same names in all versions.

    Raises:
        InvalidInputError: A later step of `generate` whose cache holds none of the earlier tokens.
    """
    found = _Found()
    frame = sys._getframe(1)
    while frame is not None:
        variables = frame.f_locals
        if found.source is None:
            found.source = _first_tensor(variables.get("module_input"))
        if isinstance(variables.get("self"), torch.nn.Module):
            _read_frame(frame.f_code.co_name, variables, found, batch, pos)
        frame = frame.f_back
    if found.is_later_step and found.cache is not None and is_empty(found.cache):
        raise InvalidInputError(
            "the model generates as if it had not read the prompt: the cache of keys and values that it was given is empty, as "
            "with a TransformerBridge up to TransformerLens 4.3 and transformers from 5.24 on; expected a cache that holds the "
            "earlier tokens: pass generate(..., use_past_kv_cache=False)"
        )
    n_cached = None if found.is_later_step else 0
    if found.cache is not None and found.model is not None:
        measured = n_cached_tokens(found.cache, int(found.model.cfg.n_layers), pos, hook_name)
        n_cached = n_cached if measured is None else measured
    return RunContext(
        found.model, found.tokens, found.mask, n_cached, found.cache, found.search, found.stops_early, found.source
    )


def _read_frame(function: str, variables: Mapping[str, Any], found: _Found, batch: int, pos: int) -> None:
    """Take from the frame of a module's method what is not found yet."""
    if found.tokens is None:
        found.tokens = _input_ids(variables, batch, pos)
    if found.mask is None:
        found.mask = _attention_mask(variables, batch, pos)
    if found.cache is None:
        found.cache = _cache(variables)
    prompt, sampled = variables.get("input_tokens"), variables.get("sampled_tokens_list")
    if isinstance(prompt, Tensor) and isinstance(sampled, list):
        # HookedTransformer.generate runs on embeddings, and has their ids beside them. 2.16 makes up ids for the
        # forward pass, and a mask that follows from them.
        ids = torch.cat([prompt, *sampled], 1)[:, -pos:]
        found.tokens = ids if tuple(ids.shape) == (batch, pos) else found.tokens
        found.mask = found.mask if "initial_attention_mask" in variables else None
    if found.is_later_step is None and function in _GENERATING_FUNCTIONS:
        found.is_later_step = _is_later_step(variables, batch, pos)
    if found.search is None and _SEARCH.fullmatch(function):
        found.search = function
    found.stops_early = found.stops_early or variables.get("stop_at_layer") is not None
    # Few classes have `run_with_hooks`, so the cheap question comes first.
    module = variables["self"]
    if hasattr(type(module), "run_with_hooks") and is_model(module):
        found.model = module


def _is_later_step(variables: Mapping[str, Any], batch: int, pos: int) -> bool:
    """True in a generating function whose texts are longer than what is run."""
    if "sampled_tokens_list" in variables:
        return bool(variables["sampled_tokens_list"])
    texts = (variables.get(name) for name in ("current_tokens", "tokens", "input_ids"))
    return not any(isinstance(ids, Tensor) and tuple(ids.shape) == (batch, pos) for ids in texts)


def _first_tensor(module_input: Any) -> Tensor | None:
    """The activation that entered a hook point, from the arguments of its forward hook."""
    first = module_input[0] if isinstance(module_input, tuple) and module_input else module_input
    return first if isinstance(first, Tensor) else None


def _input_ids(variables: Mapping[str, Any], batch: int, pos: int) -> Int[Tensor, "batch pos"] | None:
    """The token ids among the variables of a forward pass."""
    for name in ("tokens", "input_ids", "input"):
        ids = variables.get(name)
        if isinstance(ids, Tensor) and tuple(ids.shape) == (batch, pos) and not ids.is_floating_point():
            return ids
    return None


def _attention_mask(variables: Mapping[str, Any], batch: int, pos: int) -> Int[Tensor, "batch pos"] | None:
    """The attention mask among the variables of a forward pass, without what it says of cached tokens."""
    mask = variables.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= pos:
        return mask[:, -pos:]
    return None


def _cache(variables: Mapping[str, Any]) -> Any:
    """The keys and values of earlier tokens that a forward pass was given, or None."""
    keywords = variables.get("kwargs")
    given = keywords.get("past_key_values") if isinstance(keywords, dict) else None
    caches = (variables.get("past_kv_cache"), given, variables.get("past_key_values"))
    return next((cache for cache in caches if cache is not None), None)


def skipped_positions(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None,
    keep_special_tokens: bool = False,
) -> Bool[Tensor, "batch pos"]:
    """True at padding, BOS and the other special tokens; with `keep_special_tokens`, at padding and the first BOS alone.

    The placeholders of images are no special tokens here: visual tokens stand at their positions. Without a mask, padding
    tokens at either end are padding. Where BOS and padding share an id (GPT-2), the last of the leading ones is BOS.
    """
    tokenizer = model.tokenizer
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if attention_mask is not None:
        skipped = attention_mask.to(tokens.device) == 0
    elif pad is not None:
        is_text = (tokens != pad).long()
        skipped = (is_text.cumsum(-1) == 0) | (is_text.flip(-1).cumsum(-1).flip(-1) == 0)
    else:
        skipped = torch.zeros_like(tokens, dtype=torch.bool)
    if tokenizer is not None:
        first = ~skipped & ((~skipped).long().cumsum(-1) == 1)
        for start in (tokenizer.bos_token_id, tokenizer.cls_token_id):
            if start is not None:
                skipped = skipped | (first & (tokens == start))
    if not keep_special_tokens and (special_ids := sorted(skippable_token_ids(model))):
        skipped = skipped | torch.isin(tokens, torch.tensor(special_ids, device=tokens.device))
    return skipped
