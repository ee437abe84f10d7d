"""The local page that `tl-latentlens explore` serves. Importing it is cheap: Dash is imported when the page is made."""

from tl_latentlens.explorer.app import make_app

__all__ = ["make_app"]
