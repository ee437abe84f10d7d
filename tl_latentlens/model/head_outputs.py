"""The outputs that attention heads add to the residual stream, computed from `attn.hook_z`."""

from typing import Any

from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.output_weights import head_weight
from tl_latentlens.search.ambient import own_arithmetic


@own_arithmetic(full_products=True)
def head_outputs(model: Any, layer: int, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... head d_model"]:
    """The vector that each attention head adds to the output of its layer, z @ W_O, as in `attn.hook_result`: without b_O.

    Args:
        model: A TransformerLens model.
        layer: The layer of the heads.
        z: `blocks.{layer}.attn.hook_z`, all heads.

    Raises:
        InvalidInputError: z has another shape than the layer's W_O takes, or the layer has no attention heads.
    """
    weight = head_weight(model, layer)
    if tuple(z.shape[-2:]) != tuple(weight.shape[:2]):
        raise InvalidInputError(
            f"got z of shape {tuple(z.shape)}; expected [..., {weight.shape[0]} heads, d_head {weight.shape[1]}], the "
            f"activation blocks.{layer}.attn.hook_z"
        )
    return einsum(z.to(weight.device, weight.dtype), weight, "... head d_head, head d_head d_model -> ... head d_model")


@own_arithmetic(full_products=True)
def head_output(model: Any, layer: int, head: int, z: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_model"]:
    """The vector that one attention head adds to the output of its layer; see `head_outputs`."""
    weight = head_weight(model, layer)
    return z.to(weight.device, weight.dtype) @ weight[head]
