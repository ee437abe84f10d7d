"""Arguments and options that several commands share."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import tl_latentlens as tll
from tl_latentlens.cli.option_groups import OptionGroup
from tl_latentlens.errors import InvalidInputError, LatentLensError, ModelMismatchError
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.layers import one_hook_name
from tl_latentlens.model.source import source_of_name

_LOADING = "How the model is loaded"
_RAY = "On a Ray cluster"

KindOption = Annotated[
    str | None,
    typer.Option(
        help="`hooked` (HookedTransformer) or `bridge` (TransformerBridge); default: what is installed",
        rich_help_panel=_LOADING,
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="`cpu`, `cuda`, `cuda:1`; default: CUDA where there is one")]
HookOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hook-name",
        "-n",
        help="a hook name, or layers in place of hook_resid_post (3, 3-8, 3,5,7, -1, all); give it several times for several",
    ),
]
BankArgument = Annotated[Path, typer.Argument(help="a bank file (.h5), or the folder of its shards")]
MODEL_HELP = (
    "`demo`, `smollm2`, `gemma3-270m`, a folder in Hugging Face format, a GGUF file, or a name TransformerLens knows (`gpt2`)"
)


@dataclass
class DataOptions(OptionGroup):
    """The options that print a result as data."""

    json: Annotated[bool, typer.Option("--json", help="print the result as JSON in place of tables")] = False
    csv: Annotated[bool, typer.Option("--csv", help="print the result as CSV in place of tables")] = False

    def __post_init__(self) -> None:
        """Refuse both at once.

        Raises:
            InvalidInputError: Both were asked for.
        """
        if self.json and self.csv:
            raise InvalidInputError("got --json and --csv; expected one of the two")

    @property
    def as_json(self) -> bool | None:
        """True for JSON, False for CSV, None for tables."""
        return True if self.json else False if self.csv else None


@dataclass
class ModelOptions(OptionGroup):
    """The options of the model that a command loads; the bank's own model where none is named."""

    model: Annotated[
        str | None, typer.Option("--model", "-m", help=f"{MODEL_HELP}; default: the one that the bank was built with")
    ] = None
    kind: KindOption = None
    device: DeviceOption = None
    model_dtype: Annotated[
        str | None,
        typer.Option(
            help="of the weights: `float32`, `bfloat16`, `float16`; default: as the bank's model had, or `float32`",
            rich_help_panel=_LOADING,
        ),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(
            help="the layers on several devices: `auto`, `balanced`, or JSON (part of the model → device)",
            rich_help_panel=_LOADING,
        ),
    ] = None
    n_devices: Annotated[int | None, typer.Option(help="spread the layers over so many GPUs", rich_help_panel=_LOADING)] = None
    max_memory: Annotated[
        list[str] | None,
        typer.Option(
            help="most memory on a device, `0=20GiB`, with the two above; give it several times for several",
            rich_help_panel=_LOADING,
        ),
    ] = None
    _info: ModelInfo | None = field(default=None, init=False)

    def load(self) -> Any:
        """The named model.

        Raises:
            InvalidInputError: None is named, or it cannot be loaded.
        """
        return self.loader()()

    def loader(self) -> Callable[[], Any]:
        """What loads the named model, here or in another process.

        Raises:
            InvalidInputError: None is named.
        """
        if self.model is None:
            raise InvalidInputError(
                "got no --model; expected the embedded one, --model demo, a folder in Hugging Face format, a GGUF file, or a "
                "name that TransformerLens knows, --model gpt2"
            )
        return partial(tll.load_model, self.model, **self._settings(), dtype=self.model_dtype)

    def load_for(self, bank: tll.Bank) -> Any:
        """The named model, or else the one that the bank was built with.

        Raises:
            InvalidInputError: It cannot be loaded.
        """
        self._info = bank.model_info
        if self.model is not None:
            return self.load()
        return tll.load_model_of(bank, **self._settings(), dtype=self.model_dtype)

    def advice(self, error: LatentLensError) -> str | None:
        """The --model to pass where model and bank do not match."""
        if self._info is None or not isinstance(error, ModelMismatchError):
            return None
        source = self._info.source
        if self.model is None or (source and source_of_name(self.model) == source):
            return f"The bank names {source or 'demo'} as its model; pass --model with the one that built it."
        if source:
            return f"The bank's model was loaded from {source}: pass --model {source}, or leave --model out."
        return f"Pass --model with the one that built the bank, {self._info.name}."

    def _settings(self) -> dict[str, Any]:
        names = ("kind", "device", "n_devices")
        device_map = None if self.device_map is None else _device_map(self.device_map)
        memory = None if self.max_memory is None else dict(map(_memory_of_device, self.max_memory))
        device = None if device_map is not None else self.device
        return {
            **{name: getattr(self, name) for name in names},
            "device": device,
            "device_map": device_map,
            "max_memory": memory,
        }


@dataclass
class RayOptions(OptionGroup):
    """The options of a build on a Ray cluster."""

    ray: Annotated[
        str | None,
        typer.Option(
            help="build the shards on a Ray cluster: its address, `auto` (the one that runs here) or `local` (start one)",
            rich_help_panel=_RAY,
        ),
    ] = None
    n_workers: Annotated[int | None, typer.Option(help="default: one a GPU", rich_help_panel=_RAY)] = None
    n_shards: Annotated[int | None, typer.Option(help="default: four a worker", rich_help_panel=_RAY)] = None
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="default: 1 where the cluster has GPUs", rich_help_panel=_RAY)
    ] = None

    def is_asked(self, shard: str | None) -> bool:
        """True where Ray is to build all shards.

        Raises:
            InvalidInputError: The other options say otherwise.
        """
        if self.ray is not None and shard is not None:
            raise InvalidInputError("got --ray and --shard; Ray builds all shards: leave --shard out")
        if self.ray is None and any(self.settings().values()):
            raise InvalidInputError(
                "got --n-workers, --n-shards or --gpus-per-worker without --ray; give --ray local, or leave them out"
            )
        return self.ray is not None

    def settings(self) -> dict[str, Any]:
        """The arguments of `build_bank_on_ray`."""
        address = None if self.ray in (None, "local") else self.ray
        names = ("n_workers", "n_shards", "gpus_per_worker")
        return {"address": address, **{name: getattr(self, name) for name in names}}


def hook_name_in_bank(hook_name: str | None, bank: tll.Bank) -> str | None:
    """The hook name that an option names, where a layer stands for its hook_resid_post; None where it was left out."""
    return None if hook_name is None else one_hook_name(hook_name, bank.model_info.n_layers)


def _device_map(text: str) -> str | dict[str, Any]:
    try:
        return json.loads(text) if text.startswith("{") else text
    except ValueError as error:
        raise InvalidInputError(f"got --device-map {text!r}, which is no JSON: {error}") from None


def _memory_of_device(text: str) -> tuple[int | str, str]:
    device, is_given, amount = text.partition("=")
    if not is_given or not device or not amount:
        raise InvalidInputError(
            f"got --max-memory {text!r}; expected a device and an amount, for instance 0=20GiB or cpu=64GiB"
        )
    return int(device) if device.isdigit() else device, amount
