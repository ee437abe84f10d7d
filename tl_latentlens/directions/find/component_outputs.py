"""The outputs of attention heads and MLP neurons at one position of the residual stream; `component_ranking` ranks them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.activations import activations_at
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.hook_names import require_firing
from tl_latentlens.model.output_weights import head_weight, neuron_weight, output_bias
from tl_latentlens.model.running import run_hooked
from tl_latentlens.search.ambient import own_arithmetic

_RESIDUAL_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)")
_SUM_TOLERANCE = 0.05  # A share of the activation's length: bfloat16 models round at every layer.


@dataclass(frozen=True, eq=False)
class ComponentOutputs:
    """Activations of heads and neurons at the last token of n prompts, float32 on the CPU.

    Attributes:
        resid_pre: The residual stream that enters block 0, [n, d_model].
        z: `attn.hook_z` of each layer that writes before the activation, [layers, n, head, d_head].
        post: `mlp.hook_post` of those layers, [layers, n, d_mlp].
        activation: The activation that they write to, [n, d_model].
    """

    resid_pre: Float[Tensor, "n d_model"]
    z: Float[Tensor, "layers_attn n head d_head"]
    post: Float[Tensor, "layers_mlp n d_mlp"]
    activation: Float[Tensor, "n d_model"]


@dataclass(frozen=True, eq=False)
class OutputWeights:
    """Output weights of the heads and neurons that write before an activation, where the model has them.

    Attributes:
        out_heads: W_O of each layer, [head, d_head, d_model].
        out_neurons: W_out of each layer, [d_mlp, d_model].
        biases: The sum of their biases, [d_model], float32 on the CPU.
    """

    out_heads: list[Float[Tensor, "head d_head d_model"]]
    out_neurons: list[Float[Tensor, "d_mlp d_model"]]
    biases: Float[Tensor, " d_model"]

    @own_arithmetic(full_products=True)
    def heads(self, outputs: ComponentOutputs, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "n layers_attn head"]:
        """Each head's output, z @ W_O, projected on a direction."""
        projections = [_project(weight, direction) for weight in self.out_heads]
        return einsum(outputs.z, _stack(projections, (0, 0)), "layer n head d, layer head d -> n layer head")

    @own_arithmetic(full_products=True)
    def neurons(self, outputs: ComponentOutputs, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "n layers_mlp d_mlp"]:
        """Each neuron's output, post * W_out, projected on a direction."""
        projections = [_project(weight, direction) for weight in self.out_neurons]
        return einsum(outputs.post, _stack(projections, (0,)), "layer n neuron, layer neuron -> n layer neuron")

    @own_arithmetic(full_products=True)
    def largest_of_heads(
        self, z: Float[Tensor, "layers_attn head d_head"], directions: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, " n"]:
        """The largest output of any head, z @ W_O, projected on each direction."""
        largest = torch.full((len(directions),), -torch.inf)
        for of_layer, weight in zip(z, self.out_heads, strict=True):
            outputs = einsum(of_layer.to(weight.device), weight.float(), "head d, head d d_model -> head d_model")
            largest = torch.maximum(largest, (outputs @ directions.T.to(outputs)).amax(0).cpu())
        return largest

    @own_arithmetic(full_products=True)
    def largest_of_neurons(
        self, post: Float[Tensor, "layers_mlp d_mlp"], directions: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, " n"]:
        """The largest output of any neuron, post * W_out, projected on each direction."""
        largest = torch.full((len(directions),), -torch.inf)
        for of_layer, weight in zip(post, self.out_neurons, strict=True):
            projections = weight.float() @ directions.T.to(weight.device)
            largest = torch.maximum(largest, (projections * of_layer.to(weight.device)[:, None]).amax(0).cpu())
        return largest

    @own_arithmetic(full_products=True)
    def require_sum(self, outputs: ComponentOutputs, hook_name: str) -> None:
        """Check on the first prompt that resid_pre, heads, neurons and biases add up to the activation.

        Raises:
            InvalidInputError: They do not: the model changes outputs before it adds them (Gemma 2's norms, for instance).
        """
        total, activation = outputs.resid_pre[0] + self.biases, outputs.activation[0]
        for z, weight in zip(outputs.z, self.out_heads, strict=True):
            total = total + _project(weight.flatten(0, 1).T, z[0].flatten())
        for post, weight in zip(outputs.post, self.out_neurons, strict=True):
            total = total + _project(weight.T, post[0])
        error = float((total - activation).norm() / activation.norm())
        if not error <= _SUM_TOLERANCE:
            raise InvalidInputError(
                f"embedding, heads, neurons and biases do not add up to {hook_name}: {error:.0%} of its length is off; "
                "expected a model that adds z @ W_O and post @ W_out as they are, without a norm in between (as Gemma 2 has). "
                "Use find_features"
            )


class LayersBefore(NamedTuple):
    """The number of layers whose attention, and of layers whose MLP, writes before a residual activation."""

    n_attn: int
    n_mlp: int


def layers_before(hook_name: str) -> LayersBefore:
    """The layers that write before a residual activation.

    Raises:
        InvalidInputError: It is none of resid_pre, resid_mid, resid_post.
    """
    match = _RESIDUAL_HOOK.fullmatch(hook_name)
    if match is None:
        raise InvalidInputError(
            f"got hook_name={hook_name!r}; expected blocks.L.hook_resid_pre, _mid or _post: heads and neurons write into those"
        )
    layer = int(match[1])
    return LayersBefore(layer + (match[2] != "pre"), layer + (match[2] == "post"))


def output_weights(model: Any, hook_name: str) -> OutputWeights:
    """The output weights of heads and neurons that write before `hook_name`; the model does not run for them.

    Raises:
        InvalidInputError: A layer without such heads or neurons, as in mixtures of experts and state-space models.
    """
    n_attn, n_mlp = layers_before(hook_name)
    try:
        out_heads = [head_weight(model, layer) for layer in range(n_attn)]
        out_neurons = [neuron_weight(model, layer) for layer in range(n_mlp)]
        require_firing([*_z_names(n_attn), *_post_names(n_mlp)], model)
    except InvalidInputError as error:
        raise InvalidInputError(f"{error}. Use find_features") from error
    biases = [output_bias(model, layer, "attn") for layer in range(n_attn)]
    biases += [output_bias(model, layer, "mlp") for layer in range(n_mlp)]
    return OutputWeights(
        out_heads, out_neurons, _stack([bias for bias in biases if bias is not None], (model.cfg.d_model,)).sum(0)
    )


def record_component_outputs(model: Any, prompts: Sequence[Sequence[int]], hook_name: str) -> ComponentOutputs:
    """The activations of heads and neurons before `hook_name` at the last token of each prompt, from one run of the model.

    Raises:
        UnknownHookError: The model lacks one of the hooks.
    """
    n_attn, n_mlp = layers_before(hook_name)
    z_names, post_names = _z_names(n_attn), _post_names(n_mlp)
    hook_names = ["blocks.0.hook_resid_pre", *z_names, *post_names, hook_name]
    activations = activations_at(model, prompts, [len(prompt) - 1 for prompt in prompts], hook_names)
    n = len(prompts)
    return ComponentOutputs(
        activations["blocks.0.hook_resid_pre"],
        _stack([activations[name].unflatten(-1, (model.cfg.n_heads, -1)) for name in z_names], (n, 0, 0)),
        _stack([activations[name] for name in post_names], (n, 0)),
        activations[hook_name],
    )


def attention_at_end(model: Any, prompt: Sequence[int], n_layers: int) -> Float[Tensor, "layers head pos"] | None:
    """Attention weights from the last token of a prompt, float32 on the CPU; None where the model has no hook for them."""
    hook_names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]
    if any(name not in model.hook_dict for name in hook_names):
        return None
    captured: list[Tensor] = []

    def capture(pattern: Tensor, hook: Any) -> None:
        captured.append(pattern.detach()[0, :, -1].float().cpu())

    tokens = torch.tensor([list(prompt)], device=model_device(model))
    run_hooked(model, tokens, None, [(name, capture) for name in hook_names])
    return torch.stack(captured) if len(captured) == n_layers else None


def _z_names(n_layers: int) -> list[str]:
    return [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]


def _post_names(n_layers: int) -> list[str]:
    return [f"blocks.{layer}.mlp.hook_post" for layer in range(n_layers)]


def _project(weight: Float[Tensor, "... d"], vector: Float[Tensor, " d"]) -> Float[Tensor, "..."]:
    """Products of the weight's rows with a vector, float32 on the CPU."""
    return (weight.float() @ vector.to(weight.device)).cpu()


def _stack(tensors: Sequence[Tensor], empty_shape: tuple[int, ...]) -> Tensor:
    """The tensors stacked, float32 on the CPU; [0, *empty_shape] if there are none."""
    return torch.stack([tensor.detach().float().cpu() for tensor in tensors]) if tensors else torch.zeros(0, *empty_shape)
