"""The bank of the embedded model and corpus, which several subjects draw from; built once."""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import tl_latentlens as tll

_folder = tempfile.TemporaryDirectory()


@lru_cache(1)
def demo_model() -> Any:
    """The embedded model."""
    return tll.load_demo_model()


@lru_cache(1)
def demo_bank() -> tll.Bank:
    """The bank that `tl-latentlens demo` builds, in a folder that is removed at the end."""
    return tll.build_bank(demo_model(), "demo", Path(_folder.name) / "demo.h5", progress=False)
