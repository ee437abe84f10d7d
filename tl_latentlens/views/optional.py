"""Optional packages that draw: plotly and Pillow, imported when first used, with an error that names the extra."""

from typing import Any

from tl_latentlens.errors import MissingExtraError


def missing_extra(purpose: str, extra: str) -> MissingExtraError:
    """The error that says which extra to install."""
    return MissingExtraError(f'{purpose}: pip install "tl-latentlens[{extra}]"')


def plotly_graph_objects() -> Any:
    """The module `plotly.graph_objects`.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise missing_extra("plotting needs plotly", "viz") from error
    return plotly.graph_objects


def plotly_subplots(n_rows: int, n_columns: int, **settings: Any) -> Any:
    """A plotly figure of several panels, as `plotly.subplots.make_subplots` makes it.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    plotly_graph_objects()
    from plotly.subplots import make_subplots

    return make_subplots(n_rows, n_columns, **settings)


def pillow() -> Any:
    """The module `PIL.Image`.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pictures in files need Pillow", "vision") from error
    return Image
