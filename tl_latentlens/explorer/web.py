"""Dash and its server, imported when the page is first made: they are an optional extra, and slow to import."""

from importlib import import_module
from typing import Any

from tl_latentlens.views.optional import missing_extra


class LazyModule:
    """A module that is imported when the first of its names is used."""

    def __init__(self, name: str) -> None:
        """Keep the name of the module."""
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """Import the module, and give what it calls so.

        Raises:
            MissingExtraError: The module is not installed.
        """
        try:
            module = import_module(self._name)
        except ImportError as error:
            raise missing_extra("the explore page needs dash", "explore") from error
        return getattr(module, attribute)


dash, dcc, html = LazyModule("dash"), LazyModule("dash.dcc"), LazyModule("dash.html")
flask, serving = LazyModule("flask"), LazyModule("werkzeug.serving")
