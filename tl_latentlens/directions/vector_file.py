"""One vector read from a file; `decode` finds its nearest rows."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError


def read_vector(path: str | Path, *, key: str | None = None) -> Float[Tensor, " d"]:
    """One vector, float32, from a .npy, .pt or .safetensors file, or from a .csv file of numbers.

    Args:
        path: The file.
        key: The name of the tensor in a .pt or .safetensors file that holds several; None: the first.

    Raises:
        InvalidInputError: No such file, another ending or content, no such key, or not one vector.
    """
    path = Path(path).expanduser()
    if not path.is_file() or path.suffix not in (".npy", ".pt", ".safetensors", ".csv"):
        raise InvalidInputError(f"no vector at {path}: expected an existing .npy, .pt, .safetensors or .csv file")
    try:
        content = _read(path)
    except Exception as error:  # NumPy, torch and safetensors raise many kinds for bytes that they cannot read.
        raise InvalidInputError(f"{path} cannot be read as {path.suffix}: {error}") from error
    if isinstance(content, dict):
        if not content or (key is not None and key not in content):
            raise InvalidInputError(f"{path} holds no tensor {key!r}; it has {list(content)[:10]}")
        content = content[next(iter(content)) if key is None else key]
    if not isinstance(content, Tensor) or content.squeeze().ndim != 1:
        shape = tuple(content.shape) if isinstance(content, Tensor) else type(content).__name__
        raise InvalidInputError(f"{path} holds {shape}; expected one vector, [d]. Save the row you mean by itself")
    return content.squeeze().float()


def _read(path: Path) -> Tensor | dict[str, Tensor]:
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.from_numpy(np.load(path) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",", ndmin=1))
