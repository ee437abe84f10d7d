"""The state in which a model is run or its parts are called: evaluation mode, and without the hooks on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def runs_here(model: Any) -> bool:
    """True for a model of this process, with weights and modules; False for one that runs elsewhere, as a RemoteBridge."""
    return isinstance(model, torch.nn.Module)


def named_parts(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Path and module of each part of a model, each once; of a model that runs elsewhere, the hook points alone."""
    if runs_here(model):
        yield from model.named_modules()
        return
    paths = {part: path for path, part in reversed(model.hook_dict.items())}
    yield from ((path, part) for part, path in paths.items())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A context in which the model is in evaluation mode, without dropout; the mode is put back afterwards.

    A new HookedTransformer is in training mode. A model in evaluation mode is left alone, since switching a bridge takes many
    milliseconds. One that runs elsewhere has no such mode.
    """
    if not runs_here(model):
        yield
        return
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
def without_hooks(module: Any) -> Iterator[None]:
    """A context in which a model, or a part of one, can be called without firing any hook on it, the user's or ours."""
    parts = (part for _, part in named_parts(module) if part._forward_hooks and hasattr(part, "fwd_hooks"))
    hooked = [(part, part._forward_hooks) for part in parts]
    try:
        for part, hooks in hooked:
            part._forward_hooks = type(hooks)()
        yield
    finally:
        for part, hooks in hooked:
            part._forward_hooks = hooks


class StopRun(Exception):  # noqa: N818 - it ends a run, it is no error
    """Raised by a hook after the last one that is needed."""
