"""Runs of many prompts in padded batches, and the activations at one position of each."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.errors import UnknownHookError
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.heads import tl_hook_name
from tl_latentlens.model.hook_names import require_firing
from tl_latentlens.model.running import run_hooked
from tl_latentlens.search.ambient import own_arithmetic

_CPU_BATCH_TOKENS = 1024
_GPU_BATCH_TOKENS = 16384


def pad_prompts(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Tokens padded at the right, and a mask that is True where there is a token."""
    lengths = np.array([len(prompt) for prompt in prompts])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = np.concatenate([np.asarray(prompt) for prompt in prompts])
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def batches_by_length(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[Int[np.ndarray, " batch"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Batches of prompts of like length, longest first.

    Yields:
        Which of `prompts` are in the batch, their tokens padded at the right, and a mask that is True where there is a token.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    longest_first = np.argsort(-lengths, kind="stable")
    batch_tokens = _CPU_BATCH_TOKENS if device.type == "cpu" else _GPU_BATCH_TOKENS
    start = 0
    while start < len(longest_first):
        batch_size = max(1, batch_tokens // int(lengths[longest_first[start]]))
        prompt_ids = longest_first[start : start + batch_size]
        yield prompt_ids, *pad_prompts([prompts[i] for i in prompt_ids], device)
        start += len(prompt_ids)


def activations_at(
    model: Any,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int] | Int[np.ndarray, " prompts"],
    hook_names: Sequence[str],
    *,
    progress: str | None = None,
) -> dict[str, Float[Tensor, "prompts d"]]:
    """The activations of each hook name, or head, at one position of each prompt, in float32 on the CPU.

    Args:
        model: A model.
        prompts: Token ids.
        positions: The position in each prompt.
        hook_names: Hook names or heads.
        progress: The title of a progress bar; None: no bar.

    Raises:
        UnknownHookError: A hook name that the model does not have, or that did not fire.
    """
    require_firing(hook_names, model)
    activations: dict[str, Tensor] = {}
    position_of_prompt = torch.from_numpy(np.array(positions))

    def keep(activation: Tensor, hook: Any, *, name: str, prompt_ids: Int[Tensor, " batch"]) -> None:
        with own_arithmetic():
            flat = flat_activation(name, activation, activation.shape[:2])
            vectors = flat[torch.arange(len(prompt_ids)), position_of_prompt[prompt_ids]].float().cpu()
            shape = len(prompts), vectors.shape[-1]
            activations.setdefault(name, torch.empty(shape, dtype=torch.float32))[prompt_ids] = vectors

    with tqdm(total=len(prompts), desc=progress, unit=" prompts", delay=2, disable=progress is None) as bar:
        for batch, tokens, mask in batches_by_length(prompts, model_device(model)):
            prompt_ids = torch.from_numpy(batch)
            hooks = [(tl_hook_name(name), partial(keep, name=name, prompt_ids=prompt_ids)) for name in hook_names]
            run_hooked(model, tokens, mask, hooks)
            bar.update(len(batch))
    for name in hook_names:
        if name not in activations:
            raise UnknownHookError(f"{name} did not fire when the model ran; expected a hook name that this model uses")
    return activations


def prompts_as_run(
    prompts: Sequence[list[int]], positions: Int[np.ndarray, " prompts"], settings: PlanSettings
) -> tuple[list[list[int]], Int[np.ndarray, " prompts"]]:
    """Prompts as a bank's model runs them, and where given positions stand then.

    Where the plan repeats, each prompt is BOS text text, and the position is the one in the second copy.
    """
    if not settings.repeat:
        return list(prompts), positions
    start = settings.text_start
    runs = [prompt + prompt[start:] for prompt in prompts]
    return runs, positions + np.array([len(prompt) for prompt in prompts]) - start
