"""Whether activations depend on later tokens, as in encoders: measured on the model itself, at the hook names in question."""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.model.heads import tl_hook_name
from tl_latentlens.model.probe import probe_tokens
from tl_latentlens.model.state import StopRun, evaluating, without_hooks
from tl_latentlens.search.ambient import own_arithmetic

_N_TOKENS = 8  # of a prompt; the second half of the two prompts differs
_MIN_CHANGE = 1e-4  # as a share of the activation's length; smaller changes are noise of the arithmetic
_STACK_END = re.compile(r"((?:\w+_)?blocks)\.(\d+)\.(?:hook_resid_post|hook_out)")
_measured: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()
_ends_of_stacks: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


def is_bidirectional(model: Any, hook_names: Sequence[str] | None = None) -> bool:
    """True where a later token changes an earlier activation at one of the hook names, as in an encoder.

    It is measured once for each model and hook name, with two prompts that differ in their second half.

    Args:
        model: A TransformerLens model.
        hook_names: The hook names, or names of heads; None: the end of each stack of blocks.
    """
    if getattr(model.cfg, "attention_dir", "causal") == "bidirectional":
        return True
    if hook_names is None:
        if model not in _ends_of_stacks:
            _ends_of_stacks[model] = _stack_ends(model.hook_dict)
        hook_names = _ends_of_stacks[model]
    known = _measured.setdefault(model, {})
    if unknown := [name for name in hook_names if name not in known]:
        known |= dict.fromkeys(unknown, False)  # of a hook point that does not fire nothing can be said
        known |= _measure(model, unknown)
    return any(known[name] for name in hook_names)


def _stack_ends(hook_names: Any) -> list[str]:
    """The output of the last block of each stack: of `blocks`, or of `encoder_blocks` and `decoder_blocks`."""
    last: dict[str, tuple[int, str]] = {}
    for name in hook_names:
        if match := _STACK_END.fullmatch(name):
            last[match[1]] = max(last.get(match[1], (-1, "")), (int(match[2]), name))
    return [name for _, name in last.values()]


def _measure(model: Any, hook_names: Sequence[str]) -> dict[str, bool]:
    """Whether later tokens change earlier activations at each hook name that fires."""
    prompt, other = probe_tokens(model, 2, _N_TOKENS)
    n_shared = len(prompt) // 2
    changed = torch.cat([prompt[:n_shared], other[n_shared:]])
    tokens = torch.stack([prompt, changed, prompt])  # the last row shows by how much equal prompts differ
    points: dict[str, list[str]] = {}
    for name in hook_names:
        points.setdefault(tl_hook_name(name), []).append(name)
    found: dict[str, bool] = {}

    def compare(activation: Tensor, hook: Any, *, point: str) -> None:
        found[point] = _later_tokens_change(activation.detach(), tokens, n_shared)
        if len(found) == len(points):
            raise StopRun

    hooks = [(point, partial(compare, point=point)) for point in points]
    with evaluating(model), torch.no_grad(), without_hooks(model), suppress(StopRun):
        model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    return {name: is_changed for point, is_changed in found.items() for name in points[point]}


@own_arithmetic()
def _later_tokens_change(activation: Float[Tensor, "..."], tokens: Int[Tensor, "3 pos"], n_shared: int) -> bool:
    """True where the second row differs from the first before the tokens do, by more than the third does.

    The activation is [3, pos, ...], or of another shape, which has no vector for each token.
    """
    if activation.ndim < 3 or activation.shape[:2] != tokens.shape:
        return False  # no vector for each token, so it cannot be banked or decoded
    first, changed, again = activation[:, :n_shared].flatten(2).float()
    length = first.norm(dim=-1)
    change, noise = ((row - first).norm(dim=-1) / length for row in (changed, again))
    least = max(_MIN_CHANGE, 4 * torch.finfo(activation.dtype).eps)
    return bool((change > (8 * noise).clamp(min=least)).any())  # False for NaN, as where float16 overflows
