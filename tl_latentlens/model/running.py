"""Runs of a model for its hooks alone, and the state in which its parts are called."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.model.describe import is_bidirectional


def run_hooked(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    fwd_hooks: list[tuple[str, Callable]],
) -> None:
    """Run the model for its hooks only: no gradient, no logits, no layer after the last hook."""
    extra: dict[str, Any] = {} if mask is None else {"attention_mask": mask.long()}
    stop_at_layer = None if is_bidirectional(model) else _layer_after([name for name, _ in fwd_hooks])
    if stop_at_layer == model.cfg.n_layers and hasattr(model, "adapter"):
        # A bridge does not stop after its last block. It would compute the logits although nobody needs them.
        stop_at_layer = None
        if "ln_final.hook_in" in model.hook_dict:
            fwd_hooks = [*fwd_hooks, ("ln_final.hook_in", _stop_run)]
    with evaluating(model), torch.no_grad(), suppress(_StopRun):
        model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, return_type=None, stop_at_layer=stop_at_layer, **extra)


class _StopRun(Exception):  # noqa: N818 - it ends a run, it is no error
    """Raised by a hook after the last one that is needed."""


def _stop_run(activation: Tensor, hook: Any) -> None:
    raise _StopRun


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


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A context in which the model is in evaluation mode, without dropout; the mode is put back afterwards.

    A new HookedTransformer is in training mode. A model in evaluation mode is left alone, since switching a bridge takes many
    milliseconds.
    """
    was_training = model.training
    must_switch = any(module.training for module in model.modules())
    try:
        if must_switch:
            model.eval()
        yield
    finally:
        if must_switch:
            model.train(was_training)


@contextmanager
def without_hooks(module: torch.nn.Module) -> Iterator[None]:
    """A context in which a part of a model can be called without firing any hook on it, the user's or ours."""
    hooked = [(part, part._forward_hooks) for part in module.modules() if part._forward_hooks and hasattr(part, "fwd_hooks")]
    try:
        for part, hooks in hooked:
            part._forward_hooks = type(hooks)()
        yield
    finally:
        for part, hooks in hooked:
            part._forward_hooks = hooks
