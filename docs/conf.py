"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build`."""

import re
from importlib.metadata import version as package_version
from typing import Any

project = "tl-latentlens"
release = version = package_version("tl-latentlens")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]
templates_path: list[str] = []

html_theme = "furo"
html_title = "tl-latentlens"

nb_execution_mode = "off"  # the notebooks are stored with outputs, and tests/repository/test_examples.py runs them
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of a dataclass are documented once, in its docstring
napoleon_use_rtype = False
default_role = "code"  # docstrings mark code with single backticks


def _link_notebooks(app: Any, docname: str, source: list[str]) -> None:
    """Notebooks link to each other as files; Sphinx would look for those where the link docs/examples leads to."""
    if docname.startswith("examples/"):
        source[0] = re.sub(r"\[([^\]\"]+)\]\((\d\d_\w+)\.ipynb\)", r"{doc}`\1 <\2>`", source[0])


def setup(app: Any) -> None:
    """Connect what Sphinx calls."""
    app.connect("source-read", _link_notebooks)
