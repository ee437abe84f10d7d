"""The encoders of SAEs by architecture, and what is done to an activation first. Results are those of SAELens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_LAYER_NORM_EPS = 1e-5  # As SAELens' own, which it adds to the standard deviation.


def _relu(inputs: Float[Tensor, "n d_in"], sae: Any) -> Float[Tensor, "n d_sae"]:
    return _pre_activations(inputs, sae).relu()


def _jumprelu(inputs: Float[Tensor, "n d_in"], sae: Any) -> Float[Tensor, "n d_sae"]:
    before = _pre_activations(inputs, sae)
    return before.relu() * (before > sae.weights["threshold"])


def _gated(inputs: Float[Tensor, "n d_in"], sae: Any) -> Float[Tensor, "n d_sae"]:
    before = inputs @ sae.weights["W_enc"]
    magnitudes = before * sae.weights["r_mag"].exp() + sae.weights["b_mag"]
    return magnitudes.relu() * (before + sae.weights["b_gate"] > 0)


def _topk(inputs: Float[Tensor, "n d_in"], sae: Any) -> Float[Tensor, "n d_sae"]:
    before = _rescaled(_pre_activations(inputs, sae), sae)
    best = before.topk(sae.k, dim=-1)
    return before.zero_().scatter_(-1, best.indices, best.values.relu())


def _abstopk(inputs: Float[Tensor, "n d_in"], sae: Any) -> Float[Tensor, "n d_sae"]:
    before = _rescaled(_pre_activations(inputs, sae), sae)
    best = before.abs().topk(sae.k, dim=-1).indices
    values = before.gather(-1, best)
    return before.zero_().scatter_(-1, best, values)


def _matching_pursuit(inputs: Float[Tensor, "n d_in"], sae: Any) -> Float[Tensor, "n d_sae"]:
    """The nearest feature is taken away from what is left of an activation, step by step.

    An activation is done where no new feature is taken, or where what is left is shorter than the threshold.
    """
    decoder = sae.W_dec
    left = inputs.reshape(-1, inputs.shape[-1])
    activations = left.new_zeros(len(left), len(decoder))
    support = torch.zeros_like(activations, dtype=torch.bool)
    is_done = torch.zeros(len(left), dtype=torch.bool, device=left.device)
    n_steps = decoder.shape[1] if sae.max_iterations is None else sae.max_iterations
    for _ in range(n_steps):
        nearest = (left @ decoder.T).relu().argmax(-1, keepdim=True)
        rows = decoder[nearest[:, 0]]
        values = (left * rows).sum(-1, keepdim=True).relu() * ~is_done[:, None]
        activations.scatter_add_(1, nearest, values)
        left = left - values * rows
        if sae.stops_at_known_support:
            before, support = support, activations != 0
            is_done |= (support == before).all(-1)
        if sae.residual_threshold > 0:
            is_done |= left.norm(dim=-1) < sae.residual_threshold
        if bool(is_done.all()):
            break
    return activations.reshape(*inputs.shape[:-1], len(decoder))


def _pre_activations(inputs: Float[Tensor, "n d_in"], sae: Any) -> Float[Tensor, "n d_sae"]:
    return (inputs @ sae.weights["W_enc"]).add_(sae.weights["b_enc"])


def _rescaled(before: Float[Tensor, "n d_sae"], sae: Any) -> Float[Tensor, "n d_sae"]:
    return before * sae.W_dec.norm(dim=-1) if sae.rescale else before


@dataclass(frozen=True)
class Encoder:
    """One architecture.

    Attributes:
        encode: The features' activations, from the activation as the encoder reads it and the SAE.
        weights: The names of its tensors.
        unread: Tensors that it has beside W_dec and b_dec, and that no encoder reads.
    """

    encode: Callable[[Float[Tensor, "n d_in"], Any], Float[Tensor, "n d_sae"]]
    weights: frozenset[str]
    unread: frozenset[str] = frozenset()


_LINEAR, _SKIP = frozenset({"W_enc", "b_enc"}), frozenset({"W_skip"})
_THRESHOLD = _LINEAR | {"threshold"}
ENCODERS = {
    "standard": Encoder(_relu, _LINEAR),
    "jumprelu": Encoder(_jumprelu, _THRESHOLD),
    "topk": Encoder(_topk, _LINEAR),
    "abstopk": Encoder(_abstopk, _LINEAR),
    "gated": Encoder(_gated, frozenset({"W_enc", "b_gate", "b_mag", "r_mag"})),
    "matching_pursuit": Encoder(_matching_pursuit, frozenset()),
    "transcoder": Encoder(_relu, _LINEAR),
    "skip_transcoder": Encoder(_relu, _LINEAR, _SKIP),
    "jumprelu_transcoder": Encoder(_jumprelu, _THRESHOLD),
    "jumprelu_skip_transcoder": Encoder(_jumprelu, _THRESHOLD, _SKIP),
}


def _constant_norm(activations: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    return activations * (activations.shape[-1] ** 0.5 / activations.norm(dim=-1, keepdim=True))


def _layer_norm(activations: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    centered = activations - activations.mean(-1, keepdim=True)
    return centered / (centered.std(-1, keepdim=True) + _LAYER_NORM_EPS)


NORMALIZATIONS: dict[str, Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_in"]]] = {
    "none": lambda activations: activations,
    "expected_average_only_in": lambda activations: activations,  # A scale of the training, folded into the weights at its end.
    "constant_norm_rescale": _constant_norm,
    "layer_norm": _layer_norm,
}
