"""Hooks that a user has on a model: where they are, and runs without them. Hooks that only read do not count."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tl_latentlens.model.state import named_parts, without_hooks

_LIBRARIES = ("transformer_lens", "transformers", "accelerate", "sae_lens", "torch")  # Their own hooks are parts of a model.


def user_hook_points(model: Any) -> list[str]:
    """The hook points, and the modules, on which functions of the user may change what passes."""
    names = []
    for path, module in named_parts(model):
        if not hasattr(module, "fwd_hooks"):
            names += [path] * bool(_torch_hooks(module))
        elif not all(map(_only_reads, module._forward_hooks.values())):
            names.append(module.name or path)
    return names


@contextmanager
def without_user_hooks(model: Any) -> Iterator[None]:
    """A context in which the model runs without the hooks of its user, those of torch included, and without ours."""
    taken = [hook for _, module in named_parts(model) if not hasattr(module, "fwd_hooks") for hook in _torch_hooks(module)]
    kept = [(hooks, dict(hooks)) for hooks in {id(hooks): hooks for hooks, _, _ in taken}.values()]
    try:
        for hooks, key, _ in taken:
            del hooks[key]
        with without_hooks(model):
            yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


def _torch_hooks(module: Any) -> list[tuple[dict[int, Callable[..., Any]], int, Callable[..., Any]]]:
    """A user's own hooks of torch on a module: where each is held, its key, and itself."""
    found = []
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        found += [(hooks, key, hook) for key, hook in hooks.items() if not _is_of_library(hook)]
    return found


def _is_of_library(hook: Callable[..., Any]) -> bool:
    function = getattr(hook, "func", hook)  # of a partial
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.split(".")[0] in _LIBRARIES


def _only_reads(full_hook: Callable[..., Any]) -> bool:
    """True for a hook of TransformerLens around a function of a library, or one that says of itself that it changes nothing."""
    function = inspect.getclosurevars(full_hook).nonlocals.get("hook") if inspect.isfunction(full_hook) else None
    if function is None:
        return False
    return getattr(getattr(function, "func", function), "only_reads", False) or _is_of_library(function)
