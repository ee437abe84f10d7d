"""Where models were loaded from, as far as it is known; `describe_model` writes it into banks."""

import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

DEMO_MODEL = Path(__file__).parents[1] / "data" / "demo_model"
_sources: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def remember_source(model: Any, name: str) -> None:
    """Note that a model was loaded by this name: "demo", a folder or a name that TransformerLens knows."""
    _sources.setdefault(model, source_of_name(name))


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
    """A name as it is stored: a folder absolute, other names as they are, nothing that no terminal should be given."""
    source = name if name == "demo" or not is_model_folder(name) else os.path.abspath(Path(name).expanduser())
    return "demo" if source == str(DEMO_MODEL) else source if source.isprintable() else ""


def is_model_folder(name: str | Path) -> bool:
    """True for a folder with a model in Hugging Face format."""
    return (Path(name).expanduser() / "config.json").is_file()
