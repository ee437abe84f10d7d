"""What a hook can find out about the run it is called in: the model, the tokens, and which of them are padding or BOS."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.model.describe import is_model


@dataclass(frozen=True)
class RunContext:
    """What the running model knows of its input, found from inside a hook.

    Attributes:
        model: The outermost TransformerLens model that is running, or None.
        tokens: Token ids that the activation belongs to, or None.
        attention_mask: The mask given to the model, or None.
    """

    model: Any
    tokens: Int[Tensor, "batch pos"] | None
    attention_mask: Int[Tensor, "batch pos"] | None
    goes_on: bool = False


def running(batch: int, pos: int) -> RunContext:
    """Find the model and the tokens that a hook was called for.

    TransformerLens hands a hook the activation and its HookPoint, and neither leads to the model or the tokens; they stand
    in the frames of the forward passes that are calling, whose arguments have had the same names in all versions.
    """
    tokens = mask = model = step = None
    cached = False
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_locals
        owner = names.get("self")
        if isinstance(owner, torch.nn.Module):
            for name in ("tokens", "input_ids", "input"):
                ids = names.get(name)
                if (
                    tokens is None
                    and isinstance(ids, Tensor)
                    and tuple(ids.shape) == (batch, pos)
                    and not ids.is_floating_point()
                ):
                    tokens = ids
            given = names.get("attention_mask")
            if (
                mask is None
                and isinstance(given, Tensor)
                and given.ndim == 2
                and given.shape[0] == batch
                and given.shape[1] >= pos
            ):
                mask = given[:, -pos:]
            prompt, sampled = names.get("input_tokens"), names.get("sampled_tokens_list")
            if isinstance(prompt, Tensor) and isinstance(sampled, list):
                # HookedTransformer.generate runs on embeddings; their ids stand beside them. 2.16 makes up ids, and a mask
                # that follows from those, for the forward pass.
                ids = torch.cat([prompt, *sampled], 1)[:, -pos:]
                tokens = ids if tuple(ids.shape) == (batch, pos) else tokens
                mask = mask if "initial_attention_mask" in names else None
            if step is None and frame.f_code.co_name in ("generate", "generate_stream", "_sample"):
                step = bool(names["sampled_tokens_list"]) if "sampled_tokens_list" in names else True
            if hasattr(type(owner), "run_with_hooks") and is_model(owner):  # few classes have it: most frames end here
                model = owner
                given = (names.get("past_kv_cache"), (names.get("kwargs") or {}).get("past_key_values"))
                cached = cached or any(cache is not None for cache in given)
        frame = frame.f_back
    return RunContext(model, tokens, mask, cached if step is None else step)


def skipped_positions(
    model: Any, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None
) -> Bool[Tensor, "batch pos"]:
    """True at padding and BOS.

    Without a mask, a run of padding tokens at an end is padding; where BOS and padding share an id (GPT-2), the last one of
    a leading run is BOS.
    """
    tokenizer = model.tokenizer
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if attention_mask is not None:
        skipped = attention_mask.to(tokens.device) == 0
    elif pad is not None:
        text = (tokens != pad).long()
        skipped = (text.cumsum(-1) == 0) | (text.flip(-1).cumsum(-1).flip(-1) == 0)
    else:
        skipped = torch.zeros_like(tokens, dtype=torch.bool)
    if tokenizer is not None:
        first = ~skipped & ((~skipped).long().cumsum(-1) == 1)
        for start in (tokenizer.bos_token_id, tokenizer.cls_token_id):
            if start is not None:
                skipped = skipped | (first & (tokens == start))
    return skipped
