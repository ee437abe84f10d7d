"""A steering vector from two sets of prompts; `steering_lens` adds it to a run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.directions.steering.prompts import tokenize_prompts
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.activations import activations_at, batches_by_length, pad_prompts
from tl_latentlens.model.describe import model_device, require_model
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.heads import tl_hook_name
from tl_latentlens.model.hook_names import require_firing
from tl_latentlens.model.layers import one_hook_name
from tl_latentlens.model.running import run_hooked
from tl_latentlens.search.ambient import own_arithmetic


def difference_of_means(
    model: Any,
    positive: str | Sequence[str],
    negative: str | Sequence[str],
    hook_name: int | str,
    *,
    positions: int | None = -1,
) -> Float[Tensor, " d"]:
    """A steering vector: the mean activation over the positive prompts minus that over the negative ones.

    The prompts are run in batches, without gradients. No layer after the hook name is run.

    Args:
        model: A TransformerLens model with a tokenizer.
        positive: Prompts that the vector points to.
        negative: Prompts that the vector points away from.
        hook_name: The activation. Several axes after `pos`, such as heads, are laid side by side. `hook_z[1]` is one head.
            A layer stands for its hook_resid_post: 3, or -1 for the last.
        positions: -1: the last token of each prompt, whatever the padding; -2: the one before, and so on. None: the mean over
            the tokens of each prompt without special ones such as BOS; every prompt has the same weight, whatever its length.

    Returns:
        The vector, float32, on the model's device. Its length is the distance of the two means.

    Raises:
        UnknownHookError: A hook name that the model does not have.
        InvalidInputError: No prompts, a prompt without (enough) tokens, or an activation that does not fire.
    """
    require_model(model)
    hook_name = one_hook_name(hook_name, model.cfg.n_layers)
    require_firing([hook_name], model)
    if positions is not None and positions >= 0:
        raise InvalidInputError(f"got positions={positions}; expected -1 (each prompt's last token), -2, ..., or None for all")
    min_tokens = -(positions or -1)
    positive_prompts = tokenize_prompts(model, positive, "positive", min_tokens)
    negative_prompts = tokenize_prompts(model, negative, "negative", min_tokens)
    positive_mean = _mean_activation(model, positive_prompts, hook_name, positions)
    negative_mean = _mean_activation(model, negative_prompts, hook_name, positions)
    return (positive_mean - negative_mean).float().to(model_device(model))


def _mean_activation(model: Any, prompts: Prompts, hook_name: str, positions: int | None) -> Float[Tensor, " d"]:
    """The mean activation over the prompts, float64 on the CPU."""
    tokens = prompts.as_lists()
    if positions is not None:
        token_positions = np.diff(prompts.starts) + positions
        return activations_at(model, tokens, token_positions, [hook_name])[hook_name].double().mean(0)
    is_text = np.split(~prompts.special, prompts.starts[1:-1])
    sums: list[Tensor] = []
    for prompt_ids, token_ids, mask in batches_by_length(tokens, model_device(model)):
        text_mask = pad_prompts([is_text[i] for i in prompt_ids], mask.device)[0].bool()
        sums.append(_sum_of_prompt_means(model, token_ids, mask, text_mask, hook_name))
    return torch.stack(sums).sum(0) / len(tokens)


def _sum_of_prompt_means(
    model: Any,
    token_ids: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    text_mask: Bool[Tensor, "batch pos"],
    hook_name: str,
) -> Float[Tensor, " d"]:
    """The sum over a batch of each prompt's mean over the tokens of `text_mask`, float64 on the CPU."""
    weights = text_mask.float() / text_mask.sum(-1, keepdim=True)
    captured: list[Tensor] = []

    @own_arithmetic(full_products=True)
    def capture(activation: Tensor, hook: Any) -> None:
        flat = flat_activation(hook_name, activation, weights.shape).float()
        captured.append(einsum(flat, weights.to(flat.device), "batch pos d, batch pos -> d"))

    run_hooked(model, token_ids, mask, [(tl_hook_name(hook_name), capture)])
    return captured[-1].cpu().double()  # HookedTransformer runs ln1 three times: for query, key and value.
