"""Lens hooks in a model that `torch.compile` compiled: one operator of torch, which a graph can hold, calls the hook.

Where a hook breaks a graph, torch loses what other hooks return at the same hook point. So nothing of a lens hook is traced.
"""

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_hooks: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def register(hook: Callable[..., Any]) -> int:
    """The number by which `call_in_graph` calls a hook as long as it is there."""
    number = next(_numbers)
    _hooks[number] = hook
    return number


@torch.library.custom_op("tl_latentlens::call_hook", mutates_args=("calls",))
def call_in_graph(calls: Tensor, activation: Tensor, number: int, name: str) -> None:
    """Call a registered hook with an activation; `calls` counts, which keeps the compiler from leaving the call out."""
    calls.add_(1)
    hook = _hooks.get(number)
    if hook is not None:
        hook.capture(activation, name)


@call_in_graph.register_fake
def _(calls: Tensor, activation: Tensor, number: int, name: str) -> None:
    return None
