"""The run that a hook is called in: its model, its tokens, and which of them are padding or BOS."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.model.describe import is_model
from tl_latentlens.model.special_tokens import skippable_token_ids

_GENERATING_FUNCTIONS = ("generate", "generate_stream", "_sample")


@dataclass(frozen=True)
class RunContext:
    """The run that called a hook, as far as the hook can find it out.

    Attributes:
        model: The outermost TransformerLens model that is running, or None.
        tokens: Token ids that the activation belongs to, or None.
        attention_mask: The mask given to the model, or None.
        continues_generation: True where the run adds tokens to those of an earlier run, as every step of `generate` after
            the first does.
    """

    model: Any
    tokens: Int[Tensor, "batch pos"] | None
    attention_mask: Int[Tensor, "batch pos"] | None
    continues_generation: bool = False


def find_run_context(batch: int, pos: int) -> RunContext:
    """The context of the forward pass that is calling, for an activation of these sizes.

    TransformerLens gives a hook the activation and its HookPoint, and neither leads to the model or the tokens. They are
    arguments of the forward passes that are on the stack. Those arguments have had the same names in all versions.
    """
    model = tokens = mask = is_later_step = None
    has_cache = False
    frame = sys._getframe(1)
    while frame is not None:
        variables = frame.f_locals
        module = variables.get("self")
        if isinstance(module, torch.nn.Module):
            tokens = _input_ids(variables, batch, pos) if tokens is None else tokens
            mask = _attention_mask(variables, batch, pos) if mask is None else mask
            prompt, sampled = variables.get("input_tokens"), variables.get("sampled_tokens_list")
            if isinstance(prompt, Tensor) and isinstance(sampled, list):
                # HookedTransformer.generate runs on embeddings, and has their ids beside them. 2.16 makes up ids for the
                # forward pass, and a mask that follows from them.
                ids = torch.cat([prompt, *sampled], 1)[:, -pos:]
                tokens = ids if tuple(ids.shape) == (batch, pos) else tokens
                mask = mask if "initial_attention_mask" in variables else None
            if is_later_step is None and frame.f_code.co_name in _GENERATING_FUNCTIONS:
                is_later_step = bool(variables["sampled_tokens_list"]) if "sampled_tokens_list" in variables else True
            # Few classes have `run_with_hooks`, so the cheap question comes first.
            if hasattr(type(module), "run_with_hooks") and is_model(module):
                model = module
                has_cache = has_cache or _has_cache(variables)
        frame = frame.f_back
    return RunContext(model, tokens, mask, has_cache if is_later_step is None else is_later_step)


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


def _has_cache(variables: Mapping[str, Any]) -> bool:
    """True for a forward pass that was given keys and values of earlier tokens."""
    caches = (variables.get("past_kv_cache"), (variables.get("kwargs") or {}).get("past_key_values"))
    return any(cache is not None for cache in caches)


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
