"""Tensors over the memory of arrays, and the float types that vectors are stored in."""

import warnings

import numpy as np
import torch
from torch import Tensor

from tl_latentlens.errors import InvalidInputError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def as_tensor(vectors: Tensor | np.ndarray) -> Tensor:
    """A tensor over the same memory; bfloat16 arrays (ml_dtypes) become torch bfloat16.

    Raises:
        InvalidInputError: Numbers that are not real, or a tensor without numbers, on the meta device.
    """
    if isinstance(vectors, Tensor):
        array, is_real = vectors.detach(), not vectors.is_complex()
    else:
        array = np.asarray(vectors)
        is_real = array.dtype.kind in "fiubV"  # ml_dtypes' are V
    if not is_real:
        raise InvalidInputError(f"got a {type(vectors).__name__} of {array.dtype}; expected real numbers, a tensor or an array")
    if isinstance(array, Tensor):
        if array.is_meta:
            raise InvalidInputError("got a tensor on the meta device, which holds no numbers; expected one with numbers")
        return array
    if array.dtype.name == "bfloat16":
        return _from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return _from_numpy(array)


def _from_numpy(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # Nothing here writes to vectors, so a read-only memory map is fine.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
