"""Lists of hook names: those a user's choice stands for, and the checks against a model.

Facts about single hook points are in `hook_points`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np

from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.model.heads import is_head_name, tl_hook_name
from tl_latentlens.model.hook_points import forward_order, sae_input_name, switch_on_hint
from tl_latentlens.model.layers import expand_layers, layer_hook_name

_N_DEFAULT_LAYERS = 8
_ENCODER_NAME = re.compile(r"(vision|audio)_")  # a bridge of a multimodal model also has the hook points of its encoders


def expand_hook_names(model: Any, spec: int | str | Iterable[int | str] | Callable[[str], bool] | None) -> list[str]:
    """The hook names that a user's choice stands for, in forward order for None and filters, else in the given order.

    Args:
        model: A TransformerLens model.
        spec: One name, or layers in its place (3, "3-8", "all", see `expand_layers`); a list of these; a filter on names, of
            the language model alone where the model has an image encoder too; or None: `hook_resid_post` at up to eight layers
            spread evenly, first and last included.

    Raises:
        UnknownHookError: A name that the model does not have, with near ones; a layer that it does not have.
        InvalidInputError: An empty choice, a name given twice, a head's name, or a hook name that is switched off.
    """
    if spec is None:
        layers = np.linspace(0, model.cfg.n_layers - 1, min(_N_DEFAULT_LAYERS, model.cfg.n_layers)).round().astype(int)
        return list(map(layer_hook_name, layers.tolist()))
    if callable(spec):
        names = sorted((name for name in model.hook_dict if not _ENCODER_NAME.match(name) and spec(name)), key=forward_order)
    else:
        names = expand_layers(spec, model.cfg.n_layers)
    if not names:
        raise InvalidInputError("no hook name was chosen; give at least one, for instance 'blocks.0.hook_resid_post'")
    if len(set(names)) < len(names):
        raise InvalidInputError(f"a hook name was given twice: {names}")
    for name in names:
        if is_head_name(name):
            all_heads = tl_hook_name(name)
            raise InvalidInputError(
                f"got {name!r}; a bank holds all heads of a hook name: bank {all_heads!r}, and choose heads when it is loaded "
                f"(ContextualIndex(bank, '{all_heads}[:]'))"
            )
    require_firing(names, model)
    return names


def check_hook_names(names: Sequence[str], known: Any, where: str) -> None:
    """Check that each name is among `known`. A bridge of TransformerLens 3 silently ignores an unknown name.

    Raises:
        UnknownHookError: An unknown name; the message lists the nearest known ones.
        InvalidInputError: A name of an image encoder.
    """
    for name in names:
        require_language_model(name)
        if name not in known:
            if sae := sae_input_name(name, known):
                raise UnknownHookError(
                    f"{where} has no hook name {name!r} while an SAE is attached there: use {sae!r}, the same activation, or "
                    "detach the SAE (model.reset_saes())"
                )
            if "[" in name:
                raise UnknownHookError(
                    f"{where} has no hook name {name!r}; a head is written 'blocks.0.attn.hook_z[1]', all of them 'hook_z[:]'"
                )
            near = get_close_matches(name, list(known), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; it has {list(known)[:5]} and so on"
            raise UnknownHookError(f"{where} has no hook name {name!r}{hint}")


def require_language_model(name: str) -> None:
    """Check that a hook name is not that of an encoder (`vision_encoder.*`) or of the connector after it.

    Raises:
        InvalidInputError: It is one. Its activations have other widths and positions than the language model's.
    """
    if _ENCODER_NAME.match(name):
        raise InvalidInputError(
            f"got {name!r}, of an encoder beside the language model, whose vectors and positions are not the language model's; "
            "what its connector gives stands at the visual tokens of 'blocks.0.hook_resid_pre'"
        )


def require_firing(names: Sequence[str], model: Any) -> None:
    """Check that a model has the hook points that names are taken from, and that its settings let them fire.

    Raises:
        UnknownHookError: It does not have one, or an attached SAE replaces it.
        InvalidInputError: A hook point that is switched off.
    """
    points = [tl_hook_name(name) for name in names]
    check_hook_names(points, model.hook_dict, type(model).__name__)
    for point in points:
        if hint := switch_on_hint(model, point):
            raise InvalidInputError(f"{point!r} never fires on this {type(model).__name__} as it is set: {hint}")
