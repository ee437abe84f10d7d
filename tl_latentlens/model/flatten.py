"""Activations as one vector a token: heads side by side, or one head at a time."""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.heads import head_names, head_of, head_result_layer, is_head_name, tl_hook_name


def flat_activation(name: str, activation: Tensor, batch_pos: Sequence[int]) -> Float[Tensor, "batch pos d"]:
    """An activation as [batch, pos, d], detached: all heads side by side, or the one head that the name asks for.

    Args:
        name: A hook name, or that of one head.
        activation: [batch, pos, ...].
        batch_pos: The sizes of batch and pos in this run.

    Raises:
        InvalidInputError: The activation does not begin with batch and pos, as attention patterns do not; or it lacks the head.
    """
    # The shape of attention patterns could not be told from this one where a run has as many tokens as heads.
    is_pattern = name.endswith(("hook_pattern", "hook_attn_scores"))
    if is_pattern or activation.ndim < 3 or tuple(activation.shape[:2]) != tuple(batch_pos):
        raise InvalidInputError(
            f"{name} has shape {tuple(activation.shape)}; expected [batch, pos, ...] with batch and pos {tuple(batch_pos)}: "
            "only activations with a vector for each token can be banked or decoded"
        )
    head = head_of(name)
    if head is None:
        return rearrange(activation.detach(), "batch pos ... -> batch pos (...)")
    if activation.ndim != 4 or head >= activation.shape[2] or head_result_layer(name) is not None:
        heads = f"heads 0 to {activation.shape[2] - 1}" if activation.ndim == 4 else "no heads"
        raise InvalidInputError(f"got {name!r}; {tl_hook_name(name)} has {heads}, and is what is taken here as it is")
    return activation.detach()[:, :, head]


def activations_by_name(name: str, activation: Tensor) -> dict[str, Float[Tensor, "batch pos d"]]:
    """An activation under its own name, or under the name of each head that the name stands for.

    For `attn.hook_result[head]` the activation is that head's z; its output follows from `head_outputs`.

    Raises:
        InvalidInputError: As `flat_activation`, or an activation without the heads that are named.
    """
    if not is_head_name(name):
        return {name: flat_activation(name, activation, activation.shape[:2])}
    n_heads = activation.shape[2] if activation.ndim == 4 else 0
    if n_heads <= (head_of(name) or 0):
        raise InvalidInputError(
            f"got {name!r}, but {tl_hook_name(name)} has shape {tuple(activation.shape)}; expected [batch, pos, head, d_head] "
            "with that head"
        )
    return {head_name: activation.detach()[:, :, head_of(head_name)] for head_name in head_names(name, n_heads)}
