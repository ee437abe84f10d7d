"""Models loaded with raw weights: the embedded one, a local Hugging Face folder, or a name that TransformerLens knows."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.device import as_device

DEMO_MODEL = Path(__file__).parents[1] / "data" / "demo_model"
KINDS = ("hooked", "bridge")


def load_demo_model(kind: str | None = None) -> Any:
    """The embedded model: a GPT-2 of 6 layers, d_model 256, vocabulary 4096, in float32, with raw (unprocessed) weights.

    Args:
        kind: "hooked" for a HookedTransformer, "bridge" for a TransformerBridge; None: HookedTransformer where it is
            installed (TransformerLens before 4), else TransformerBridge. Their residuals agree to 1e-4.
    """
    return load_model("demo", kind=kind)


def load_model(name: str, *, kind: str | None = None, device: str | None = None) -> Any:
    """Load a model with raw weights.

    Args:
        name: "demo", a folder in Hugging Face format, or a name that TransformerLens knows ("gpt2").
        kind: "hooked", "bridge", or None: HookedTransformer where it is installed and knows the model, else the bridge.
        device: Where to put it; None: where TransformerLens puts it.

    Raises:
        InvalidInputError: A kind that the installed TransformerLens lacks, no such device, or a model that cannot be loaded.
    """
    if name == "demo-vlm":
        raise InvalidInputError("'demo-vlm' reads images, in `tl-latentlens explore`; in Python it is tll.load_demo_vlm()")
    available = [kind for kind, is_installed in zip(KINDS, (_has_hooked(), _has_bridge()), strict=True) if is_installed]
    if device is not None:
        as_device(device)
    if kind is not None and kind not in available:
        raise InvalidInputError(f"got kind={kind!r}; the installed TransformerLens has {available}")
    folder = DEMO_MODEL if name == "demo" else Path(name).expanduser()
    if not (folder / "config.json").is_file() and (folder.is_absolute() or name.startswith((".", "~"))):
        raise InvalidInputError(f"no Hugging Face model at {folder}: it has no config.json")
    failures = []
    for candidate in available if kind is None else [kind]:
        try:
            with _without_loader_messages():
                return _load(name, folder, candidate, device)
        # TransformerLens and transformers raise all of these for models, files and settings that they do not know.
        except (OSError, ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            failures.append(
                f"as {candidate}: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
            )
    raise InvalidInputError(
        f"cannot load {name!r} {'; '.join(failures)}. Give a folder with a model, or a name TransformerLens knows"
    )


def _load(name: str, folder: Path, kind: str, device: str | None) -> Any:
    if not (folder / "config.json").is_file():
        return _load_by_name(name, kind, device)
    if kind == "hooked":
        return _load_hooked_from_folder(folder, device)
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(folder), device=device).eval()


def _has_hooked() -> bool:
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def _has_bridge() -> bool:
    return find_spec("transformer_lens.model_bridge") is not None


def _load_by_name(name: str, kind: str, device: str | None) -> Any:
    if kind == "hooked":
        from transformer_lens import HookedTransformer

        return HookedTransformer.from_pretrained_no_processing(name, device=device).eval()
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device=device).eval()


def _load_hooked_from_folder(folder: Path, device: str | None) -> Any:
    """A HookedTransformer of a folder, loaded without the hub.

    `HookedTransformer.from_pretrained` asks the hub for the config even where the folder holds it.
    """
    import torch
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cfg = get_pretrained_model_config(str(folder), device=str(as_device(device)))
    state = get_pretrained_state_dict(str(folder), cfg, hf_model)
    model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder), move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.move_model_modules_to_device()
    return model.eval()


@contextmanager
def _without_loader_messages() -> Iterator[None]:
    """A context without the messages of loading that a user of this package cannot act on, such as deprecations."""
    from transformers.utils import logging as hf_logging

    root, level, bars = logging.getLogger(), logging.getLogger().level, hf_logging.is_progress_bar_enabled()
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        hf_logging.disable_progress_bar()
        try:
            yield
        finally:
            root.setLevel(level)
            if bars:
                hf_logging.enable_progress_bar()
