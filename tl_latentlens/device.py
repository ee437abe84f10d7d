"""Where tensors go."""

import torch

from tl_latentlens.errors import InvalidInputError


def as_device(device: torch.device | str | None) -> torch.device:
    """A device by its name; None: CUDA where there is one, else the CPU.

    Raises:
        InvalidInputError: There is no such device.
    """
    cuda = torch.cuda.is_available()
    try:
        found = torch.device(device or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise InvalidInputError(f"got device={device!r}; expected 'cpu', 'cuda' or 'cuda:1', say") from error
    if found.type == "cuda" and (not cuda or (found.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if cuda else 0
        raise InvalidInputError(f"got device={device!r}; torch {torch.__version__} sees {count} CUDA devices; use device='cpu'")
    return found
