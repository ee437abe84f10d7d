"""Where models were loaded from and how their weights were stored, as far as it is known; `describe_model` puts it in banks."""

import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tl_latentlens.model.gguf import is_gguf_file

DEMO_MODEL = Path(__file__).parents[1] / "data" / "demo_model"
_sources: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_quantizations: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def remember_source(model: Any, name: str) -> None:
    """Note that a model was loaded by this name: "demo", a folder, a GGUF file or a name that TransformerLens knows."""
    _sources.setdefault(model, source_of_name(name))


def remember_quantization(model: Any, quantization: str) -> None:
    """Note how the weights of a model were stored that are floats now."""
    _quantizations[model] = quantization


def quantization_of(model: Any) -> str:
    """The types of the weights in the file that a model was read from, as "Q4_1, Q8_0, F32"; empty where none is known."""
    return _quantizations.get(model, "")


def source_of(model: Any) -> str:
    """The name or the absolute folder by which a model can be loaded again; empty where it is not known.

    A model that TransformerLens loaded by itself tells its name or folder in its `cfg`. One that was made of a config has no
    such name.
    """
    if model in _sources:
        return _sources[model]
    name = str(getattr(model.cfg, "model_name", None) or "custom")
    if name == "custom":
        return ""
    full_name = str(getattr(model.cfg, "tokenizer_name", None) or name)  # of a HookedTransformer, whose name is the last part
    return source_of_name(full_name if full_name.split("/")[-1] == name else name)


def source_of_name(name: str) -> str:
    """A name as it is stored: a folder or file absolute, other names as they are, nothing that no terminal should be given."""
    is_place = name != "demo" and (is_model_folder(name) or is_gguf_file(name))
    source = os.path.abspath(Path(name).expanduser()) if is_place else name
    return "demo" if source == str(DEMO_MODEL) else source if source.isprintable() else ""


def is_model_folder(name: str | Path) -> bool:
    """True for a folder with a model in Hugging Face format."""
    return (Path(name).expanduser() / "config.json").is_file()
