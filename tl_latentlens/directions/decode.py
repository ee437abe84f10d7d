"""Directions that are no activations: steering vectors, differences of means, probes, decoder rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.search.tensors import as_tensor


def decode_directions(
    directions: Float[Tensor, "n d"] | np.ndarray,
    index: ContextualIndex,
    *,
    top_k: int = 10,
    hook_name: str | Sequence[str] | None = None,
    ids: Sequence[int] | None = None,
    calibrate: bool = False,
) -> DirectionResult:
    """Nearest contextual tokens of each direction and of its opposite.

    Args:
        directions: [n, d], or one of width d; of any length but zero. Directions are never centred.
        index: What to decode against.
        top_k: Neighbors of each sign.
        hook_name: Search only this hook name (or these); None: all of that width.
        calibrate: Also say how likely a random activation comes as near to each neighbor (`Neighbor.chance`): for a direction
            that the model does not use, chance alone explains all of them.
        ids: What the directions are called in the result; None: 0 to n - 1.

    Raises:
        InvalidInputError: A wrong shape or width, NaN, inf or zero; no index.
    """
    require_index(index)
    tensor = as_tensor(directions)
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2:
        raise InvalidInputError(f"got directions of shape {tuple(tensor.shape)}; expected [n, d] or [d]")
    positive = index.search(tensor, top_k, hook_name, calibrate=calibrate)
    negative = index.search(-tensor, top_k, hook_name, calibrate=calibrate)
    return DirectionResult(range(len(tensor)) if ids is None else list(ids), positive, negative)


def read_vector(path: str | Path, *, key: str | None = None) -> Float[Tensor, " d"]:
    """One vector from a file: .npy, .pt, .safetensors, or .csv of numbers.

    Args:
        path: The file.
        key: Which tensor, where a .pt or .safetensors file holds several by name; None: the first.

    Raises:
        InvalidInputError: No such file, another ending or content, no such key, or not one vector.
    """
    path = Path(path).expanduser()
    if not path.is_file() or path.suffix not in (".npy", ".pt", ".safetensors", ".csv"):
        raise InvalidInputError(f"no vector at {path}: expected an existing .npy, .pt, .safetensors or .csv file")
    try:
        found = _contents(path)
    except Exception as error:  # whatever NumPy, torch and safetensors say of bytes that they cannot read
        raise InvalidInputError(f"{path} cannot be read as {path.suffix}: {error}") from error
    if isinstance(found, dict):
        if not found or (key is not None and key not in found):
            raise InvalidInputError(f"{path} holds no tensor {key!r}; it has {list(found)[:10]}")
        found = found[next(iter(found)) if key is None else key]
    if not isinstance(found, Tensor) or found.squeeze().ndim != 1:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidInputError(f"{path} holds {shape}; expected one vector, [d]. Save the row you mean by itself")
    return found.squeeze().float()


def _contents(path: Path) -> Tensor | dict[str, Tensor]:
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.from_numpy(np.load(path) if path.suffix == ".npy" else np.loadtxt(path, delimiter=",", ndmin=1))
