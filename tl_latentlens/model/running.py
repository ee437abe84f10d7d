"""Runs of a model for its hooks alone; the state in which it runs is in `state`."""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.model.direction import is_bidirectional
from tl_latentlens.model.state import StopRun, evaluating, runs_here


def run_hooked(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    fwd_hooks: list[tuple[str, Callable]],
) -> None:
    """Run the model for its hooks only: no gradient, no logits, no layer after the last hook."""
    extra: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long()}
    names = [name for name, _ in fwd_hooks]
    can_stop = runs_here(model) and not is_bidirectional(model, names)
    stop_at_layer = _layer_after(names) if can_stop else None
    if stop_at_layer == model.cfg.n_layers and hasattr(model, "adapter"):
        # A bridge does not stop after its last block. It would compute the logits although nobody needs them.
        stop_at_layer = None
        if "ln_final.hook_in" in model.hook_dict:
            fwd_hooks = [*fwd_hooks, ("ln_final.hook_in", _stop_run)]
    with evaluating(model), torch.no_grad(), suppress(StopRun):
        model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, return_type=None, stop_at_layer=stop_at_layer, **extra)


def _stop_run(activation: Tensor, hook: Any) -> None:
    raise StopRun


def _layer_after(hook_names: Iterable[str]) -> int | None:
    """The first layer that no hook needs, or None where the whole model must run."""
    layers = []
    for name in hook_names:
        if name in ("hook_embed", "hook_pos_embed"):
            layers.append(0)
        elif match := re.match(r"blocks\.(\d+)\.", name):
            layers.append(int(match[1]) + 1)
        else:
            return None
    return max(layers)
