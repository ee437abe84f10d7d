"""The settings with which a model is loaded: the dtype of its weights and the devices they go to, checked before it is."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.device import as_device

WEIGHT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_HOOKED_SETTINGS = ("device", "dtype", "n_devices")
"""The settings that a HookedTransformer takes; a TransformerBridge takes all."""


@dataclass(frozen=True)
class LoadSettings:
    """The settings with which a model is loaded, under TransformerLens' own names; None: as TransformerLens does.

    Attributes:
        device: The one device of the model.
        dtype: Of the weights.
        device_map: "auto", "balanced", or part of the model → device, as transformers takes it. Only a bridge has it.
        n_devices: The number of GPUs to spread the layers over.
        max_memory: Device → most memory to use there, "20GiB", for a `device_map` or for several GPUs.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    device_map: str | Mapping[str, str | int] | None = None
    n_devices: int | None = None
    max_memory: Mapping[str | int, str | int] | None = None

    @property
    def needs_bridge(self) -> bool:
        """True where only a TransformerBridge can be loaded so."""
        return any(name not in _HOOKED_SETTINGS for name in self.given())

    def given(self) -> dict[str, Any]:
        """Name → value of the settings that are not left to TransformerLens, as its loaders take them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def load_settings(
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    n_devices: int | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
) -> LoadSettings:
    """The settings that a user gave, checked.

    Raises:
        InvalidInputError: An unknown dtype, a device that does not exist, more devices than there are, or settings that exclude
            each other.
    """
    if device is not None:
        as_device(device)
    if device is not None and device_map is not None:
        raise InvalidInputError(f"got device={device!r} and device_map={device_map!r}; expected one of the two")
    if n_devices is not None:
        _require_devices(n_devices)
    if max_memory is not None and device_map is None and n_devices is None:
        raise InvalidInputError(f"got max_memory={max_memory!r} alone; it needs device_map='auto', or n_devices")
    return LoadSettings(device, None if dtype is None else as_weight_dtype(dtype), device_map, n_devices, max_memory)


def as_weight_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of weights by its name.

    Raises:
        InvalidInputError: No floating dtype that models are run in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHT_DTYPES:
        raise InvalidInputError(f"got dtype={dtype!r} for the weights of a model; expected one of {list(WEIGHT_DTYPES)}")
    return WEIGHT_DTYPES[name]


def _require_devices(n_devices: int) -> None:
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_devices < 1 or (n_devices > 1 and n_devices > available):
        raise InvalidInputError(
            f"got n_devices={n_devices}; expected 1 up to the number of CUDA devices, of which torch {torch.__version__} sees "
            f"{available}"
        )
