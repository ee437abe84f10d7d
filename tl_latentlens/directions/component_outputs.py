"""What each attention head and MLP neuron of a model adds to the residual stream at one position; `find` ranks them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.activations import activations_at
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.running import run_hooked

_READ = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)")
_TOLERANCE = 0.05  # of the activation's length: bfloat16 models round at every layer


@dataclass(frozen=True, eq=False)
class Written:
    """What heads and neurons held at the last token of n prompts, float32 on the CPU.

    Attributes:
        before: The residual stream that enters block 0, [n, d_model].
        z: `attn.hook_z` of each layer that writes before the read activation, [layers, n, head, d_head].
        post: `mlp.hook_post` of those layers, [layers, n, d_mlp].
        after: The activation that is read, [n, d_model].
    """

    before: Float[Tensor, "n d_model"]
    z: Float[Tensor, "layers_attn n head d_head"]
    post: Float[Tensor, "layers_mlp n d_mlp"]
    after: Float[Tensor, "n d_model"]


@dataclass(frozen=True, eq=False)
class WritingWeights:
    """The weights by which heads and neurons write before an activation is read, where the model has them.

    Attributes:
        out_heads: W_O of each layer, [head, d_head, d_model].
        out_neurons: W_out of each layer, [d_mlp, d_model].
        biases: The sum of their biases, [d_model], float32 on the CPU.
    """

    out_heads: list[Float[Tensor, "head d_head d_model"]]
    out_neurons: list[Float[Tensor, "d_mlp d_model"]]
    biases: Float[Tensor, " d_model"]

    def heads(self, written: Written, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "n layers_attn head"]:
        """Each head's output, z @ W_O, along a direction."""
        along = [_onto(weight, direction) for weight in self.out_heads]
        return einsum(written.z, _stack(along, (0, 0)), "layer n head d, layer head d -> n layer head")

    def neurons(self, written: Written, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "n layers_mlp d_mlp"]:
        """Each neuron's output, post * W_out, along a direction."""
        along = [_onto(weight, direction) for weight in self.out_neurons]
        return einsum(written.post, _stack(along, (0,)), "layer n neuron, layer neuron -> n layer neuron")

    def require_sum(self, written: Written, hook_name: str) -> None:
        """Check that what the first prompt's components write adds up to what is read: before + heads + neurons + biases.

        Raises:
            InvalidInputError: It does not: the model changes outputs before it adds them (Gemma 2's norms, for instance).
        """
        total, after = written.before[0] + self.biases, written.after[0]
        for z, weight in zip(written.z, self.out_heads, strict=True):
            total = total + _onto(weight.flatten(0, 1).T, z[0].flatten())
        for post, weight in zip(written.post, self.out_neurons, strict=True):
            total = total + _onto(weight.T, post[0])
        off = float((total - after).norm() / after.norm())
        if not off <= _TOLERANCE:
            raise InvalidInputError(
                f"embedding, heads, neurons and biases do not add up to {hook_name}: {off:.0%} of its length is off; "
                "expected a model that adds z @ W_O and post @ W_out as they are, without a norm in between (as Gemma 2 has). "
                "Use find_features"
            )


def _onto(weight: Float[Tensor, "... d"], vector: Float[Tensor, " d"]) -> Float[Tensor, "..."]:
    return (weight.float() @ vector.to(weight.device)).cpu()


def layers_before(hook_name: str) -> tuple[int, int]:
    """How many layers' attention, and how many layers' MLP, write before a residual activation is read.

    Raises:
        InvalidInputError: It is none of resid_pre, resid_mid, resid_post.
    """
    match = _READ.fullmatch(hook_name)
    if match is None:
        raise InvalidInputError(
            f"got hook_name={hook_name!r}; expected blocks.L.hook_resid_pre, _mid or _post: heads and neurons write into those"
        )
    layer = int(match[1])
    return layer + (match[2] != "pre"), layer + (match[2] == "post")


def writing_weights(model: Any, hook_name: str) -> WritingWeights:
    """The weights by which heads and neurons write before `hook_name`."""
    n_attn, n_mlp = layers_before(hook_name)
    attentions = [model.blocks[layer].attn for layer in range(n_attn)]
    mlps = [model.blocks[layer].mlp for layer in range(n_mlp)]
    biases = [part.b_O for part in attentions] + [part.b_out for part in mlps]
    return WritingWeights(
        [part.W_O.detach() for part in attentions],
        [part.W_out.detach() for part in mlps],
        _stack([bias for bias in biases if bias is not None], (model.cfg.d_model,)).sum(0),
    )


def run_written(model: Any, prompts: Sequence[Sequence[int]], hook_name: str) -> Written:
    """Run prompts, and keep what heads and neurons before `hook_name` hold at each one's last token.

    Raises:
        UnknownHookError: The model lacks one of the hooks, as a mixture of experts lacks mlp.hook_post.
    """
    n_attn, n_mlp = layers_before(hook_name)
    z_names = [f"blocks.{layer}.attn.hook_z" for layer in range(n_attn)]
    post_names = [f"blocks.{layer}.mlp.hook_post" for layer in range(n_mlp)]
    names = ["blocks.0.hook_resid_pre", *z_names, *post_names, hook_name]
    found = activations_at(model, prompts, [len(prompt) - 1 for prompt in prompts], names)
    n = len(prompts)
    return Written(
        found["blocks.0.hook_resid_pre"],
        _stack([found[name].unflatten(-1, (model.cfg.n_heads, -1)) for name in z_names], (n, 0, 0)),
        _stack([found[name] for name in post_names], (n, 0)),
        found[hook_name],
    )


def attention_at_end(model: Any, prompt: Sequence[int], n_layers: int) -> Float[Tensor, "layers head pos"] | None:
    """Attention weights from the last token of a prompt, float32 on the CPU; None where the model has no hook for them."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(n_layers)]
    if any(name not in model.hook_dict for name in names):
        return None
    seen: list[Tensor] = []

    def keep(pattern: Tensor, hook: Any) -> None:
        seen.append(pattern.detach()[0, :, -1].float().cpu())

    run_hooked(model, torch.tensor([list(prompt)], device=model_device(model)), None, [(name, keep) for name in names])
    return torch.stack(seen) if len(seen) == n_layers else None


def _stack(tensors: Sequence[Tensor], empty: tuple[int, ...]) -> Tensor:
    """Stacked on the CPU in float32; of none, an empty first axis before `empty`."""
    return torch.stack([tensor.detach().float().cpu() for tensor in tensors]) if tensors else torch.zeros(0, *empty)
