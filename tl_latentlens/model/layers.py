"""Layers in place of hook names: a number, a range or "3-8" stands for `hook_resid_post` of those layers.

Which of these hook names a model or a bank has is checked by those who ask.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tl_latentlens.errors import InvalidInputError, UnknownHookError

ALL_LAYERS = "all"
_LAYER_LIST = re.compile(r"\s*-?\d+(\s*-\s*-?\d+)?(\s*,\s*-?\d+(\s*-\s*-?\d+)?)*\s*")
_LAYER_RANGE = re.compile(r"\s*(-?\d+)(?:\s*-\s*(-?\d+))?\s*")
_LAYER_HOOK = re.compile(r"blocks\.\d+\.hook_resid_post")


def layer_hook_name(layer: int) -> str:
    """The hook name that the number of a layer stands for."""
    return f"blocks.{layer}.hook_resid_post"


def is_layer_hook_name(hook_name: str) -> bool:
    """True for the `hook_resid_post` of a layer, which the layer's number stands for."""
    return _LAYER_HOOK.fullmatch(hook_name) is not None


def is_layer_choice(choice: Any) -> bool:
    """True for what stands for layers: a number, or a string such as "3", "3-8", "3,5,7", "-1" or "all"."""
    if isinstance(choice, str):
        return choice.strip() == ALL_LAYERS or _LAYER_LIST.fullmatch(choice) is not None
    return _is_number(choice)


def expand_layers(
    choice: int | str | Iterable[int | str], n_layers: int, every_layer: Sequence[str] | None = None
) -> list[str]:
    """The hook names of a user's choice, in its order, with `hook_resid_post` in place of each layer.

    >>> expand_layers("1-2,-1", 6)
    ['blocks.1.hook_resid_post', 'blocks.2.hook_resid_post', 'blocks.5.hook_resid_post']
    >>> expand_layers([0, "blocks.0.attn.hook_z"], 6)
    ['blocks.0.hook_resid_post', 'blocks.0.attn.hook_z']

    Args:
        choice: A hook name; the number of a layer, from 0 on, or from -1 back where it counts from the end; a string of numbers
            and ranges, last layer included ("3", "3-8", "3,5,7"); "all"; or several of these, for instance `range(3, 9)`.
        n_layers: The number of the model's layers.
        every_layer: The hook names that "all" stands for; None: those of all layers of the model.

    Raises:
        UnknownHookError: A layer that the model does not have.
        InvalidInputError: Something that is neither a hook name nor a layer, or a range that ends before it starts.
    """
    every_layer = list(map(layer_hook_name, range(n_layers))) if every_layer is None else every_layer
    choices: list[Any] = [choice]
    if isinstance(choice, Iterable) and not isinstance(choice, str) and not _is_number(choice):
        choices = list(choice)
    return [name for one in choices for name in _hook_names_of_one(one, n_layers, every_layer)]


def one_hook_name(choice: int | str, n_layers: int) -> str:
    """The one hook name of a user's choice, with `hook_resid_post` in place of a layer.

    Raises:
        UnknownHookError: A layer that the model does not have.
        InvalidInputError: A choice of several layers, or something that is neither a hook name nor a layer.
    """
    names = expand_layers([choice], n_layers)
    if len(names) != 1:
        raise InvalidInputError(f"got {choice!r}, which stands for {len(names)} hook names; expected one, for instance 3")
    return names[0]


def _hook_names_of_one(choice: Any, n_layers: int, every_layer: Sequence[str]) -> Sequence[str]:
    if isinstance(choice, bool) or not (isinstance(choice, str) or _is_number(choice)):
        raise InvalidInputError(
            f"got {choice!r} ({type(choice).__name__}) for a hook name; expected a hook name, the number of a layer, a string "
            "such as '3-8', or 'all'"
        )
    if not is_layer_choice(choice):
        return [choice]
    if not isinstance(choice, str):
        return [layer_hook_name(_layer(operator.index(choice), n_layers))]
    if choice.strip() == ALL_LAYERS:
        return every_layer
    return [name for part in choice.split(",") for name in _hook_names_of_range(part, n_layers)]


def _is_number(choice: Any) -> bool:
    return hasattr(type(choice), "__index__") and getattr(choice, "ndim", 0) == 0  # an array has the method too


def _hook_names_of_range(text: str, n_layers: int) -> list[str]:
    """The hook names of "3", "-1" or "3-8"."""
    match = _LAYER_RANGE.fullmatch(text)
    first, last = match.groups() if match else (text, None)
    layers = range(_layer(int(first), n_layers), _layer(int(last or first), n_layers) + 1)
    if not layers:
        raise InvalidInputError(f"got the layers {text.strip()!r}, which end before they start; write the lower one first")
    return list(map(layer_hook_name, layers))


def _layer(layer: int, n_layers: int) -> int:
    """A layer counted from 0."""
    if not -n_layers <= layer < n_layers:
        raise UnknownHookError(
            f"got layer {layer}; the model has layers 0 to {n_layers - 1}, or -{n_layers} to -1 counted from the end"
        )
    return layer % n_layers
