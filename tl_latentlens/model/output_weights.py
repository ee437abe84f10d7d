"""The weights by which attention heads and MLP neurons write to the residual stream, where a model has them."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError, UnknownHookError


def head_weight(model: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O of a layer: head h adds z[h] @ W_O[h] to the residual stream.

    Raises:
        UnknownHookError: The model has no such layer.
        InvalidInputError: The layer has no attention heads with such a weight, as in state-space models.
    """
    return _weight(model, layer, "attn", "W_O", 3, "attention heads that add z @ W_O, as state-space layers have none")


def neuron_weight(model: Any, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """W_out of a layer: neuron i adds post[i] * W_out[i] to the residual stream.

    Raises:
        UnknownHookError: The model has no such layer.
        InvalidInputError: The layer has no neurons with such a weight, as in mixtures of experts.
    """
    return _weight(model, layer, "mlp", "W_out", 2, "one MLP whose neurons add post * W_out, as a mixture of experts has not")


def output_bias(model: Any, layer: int, part: str) -> Float[Tensor, " d_model"] | None:
    """The bias of a layer's `attn` (b_O) or `mlp` (b_out); None where it has none."""
    bias = getattr(getattr(model.blocks[layer], part), {"attn": "b_O", "mlp": "b_out"}[part], None)
    return None if bias is None else bias.detach()


def _weight(model: Any, layer: int, part: str, name: str, ndim: int, expected: str) -> Tensor:
    if layer >= int(model.cfg.n_layers):
        raise UnknownHookError(f"{type(model).__name__} has no layer {layer}; it has layers 0 to {model.cfg.n_layers - 1}")
    try:
        weight = getattr(getattr(model.blocks[layer], part), name).detach()
    # TransformerLens raises all of these for a part that is missing, or whose weight is packed or quantized.
    except (AttributeError, AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InvalidInputError(
            f"blocks.{layer} of this {type(model).__name__} has no {part}.{name}; expected {expected}"
        ) from error
    if weight.ndim != ndim or weight.shape[-1] != int(model.cfg.d_model):
        raise InvalidInputError(
            f"{part}.{name} in blocks.{layer} of this {type(model).__name__} has shape {tuple(weight.shape)}; expected "
            f"{expected}"
        )
    return weight
