"""Matrices of an SAE as whole numbers of eight bits, a quarter of the bytes: how SAEs come with this package."""

import torch
from torch import Tensor

from tl_latentlens.errors import InvalidInputError

_AXIS_OF_FEATURES = {"W_enc": 1, "W_dec": 0}
_SUFFIX = "_scale"
_LARGEST = 127


def quantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, W_enc and W_dec as int8, each with a scale for each feature (`W_enc_scale`, `W_dec_scale`)."""
    quantized = dict(tensors)
    for name, axis in _AXIS_OF_FEATURES.items():
        matrix = tensors[name].float()
        scale = matrix.abs().amax(1 - axis, keepdim=True) / _LARGEST
        quantized[name] = (matrix / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8).contiguous()
        quantized[name + _SUFFIX] = scale.flatten()
    return quantized


def dequantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `quantize` was given, up to 1/254 of the largest weight of each feature; others as they are.

    Raises:
        InvalidInputError: A scale that does not fit its matrix.
    """
    dequantized = dict(tensors)
    for name, axis in _AXIS_OF_FEATURES.items():
        if name not in tensors or tensors[name].dtype != torch.int8 or name + _SUFFIX not in tensors:
            continue
        scale, matrix = dequantized.pop(name + _SUFFIX), tensors[name]
        if scale.shape != (matrix.shape[axis],):
            got = tuple(scale.shape)
            raise InvalidInputError(
                f"got {name}{_SUFFIX} of shape {got}; expected ({matrix.shape[axis]},), one for each feature"
            )
        dequantized[name] = matrix.float() * scale.unsqueeze(1 - axis)
    return dequantized
