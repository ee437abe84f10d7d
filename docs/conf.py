"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build`."""

from importlib.metadata import version as package_version

project = "tl-latentlens"
release = version = package_version("tl-latentlens")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]
templates_path: list[str] = []

html_theme = "furo"
html_title = "tl-latentlens"

nb_execution_mode = "off"  # the notebooks are stored with outputs, and tests/test_examples.py runs them
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
