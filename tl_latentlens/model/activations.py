"""Run prompts and take activations at one position of each."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.errors import UnknownHookError
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.heads import tl_hook_name
from tl_latentlens.model.hook_names import require_firing
from tl_latentlens.model.running import run_hooked

_BATCH_TOKENS = (1024, 16384)  # on a CPU, on a GPU


def padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Tokens padded at the right, and True where there is one."""
    lengths = np.array([len(prompt) for prompt in prompts])
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = np.concatenate([np.asarray(prompt) for prompt in prompts])
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


def batches(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[Int[np.ndarray, " batch"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]]:
    """Prompts of like length together: their numbers, their tokens padded at the right, and True where there is a token."""
    lengths = np.array([len(prompt) for prompt in prompts])
    order, first = np.argsort(-lengths, kind="stable"), 0
    while first < len(order):
        chosen = order[first : first + max(1, _BATCH_TOKENS[device.type != "cpu"] // int(lengths[order[first]]))]
        yield chosen, *padded([prompts[i] for i in chosen], device)
        first += len(chosen)


def activations_at(
    model: Any,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int] | Int[np.ndarray, " prompts"],
    hook_names: Sequence[str],
) -> dict[str, Float[Tensor, "prompts d"]]:
    """The activations of each hook name, or head, at one position of each prompt, in float32 on the CPU.

    Raises:
        UnknownHookError: A hook name that the model does not have, or that did not fire.
    """
    require_firing(hook_names, model)
    found: dict[str, Tensor] = {}
    at = torch.as_tensor(np.asarray(positions))

    def take(activation: Tensor, hook: Any, *, name: str, chosen: Int[Tensor, " batch"]) -> None:
        flat = flat_activation(name, activation, activation.shape[:2])
        rows = flat[torch.arange(len(chosen)), at[chosen]].float().cpu()
        found.setdefault(name, torch.empty(len(prompts), rows.shape[-1]))[chosen] = rows

    for chosen, tokens, mask in batches(prompts, model_device(model)):
        of = torch.from_numpy(chosen)
        run_hooked(model, tokens, mask, [(tl_hook_name(name), partial(take, name=name, chosen=of)) for name in hook_names])
    for name in hook_names:
        if name not in found:
            raise UnknownHookError(f"{name} did not fire when the model ran; expected a hook name that this model uses")
    return found


def as_run(
    prompts: Sequence[list[int]], positions: Int[np.ndarray, " prompts"], settings: PlanSettings
) -> tuple[list[list[int]], Int[np.ndarray, " prompts"]]:
    """Prompts and positions in them as a bank's model runs them: twice, and in the second copy, where the plan repeats."""
    if not settings.repeat:
        return list(prompts), positions
    start = settings.text_start
    return [one + one[start:] for one in prompts], positions + np.array([len(one) for one in prompts]) - start
