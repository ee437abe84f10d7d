"""Visual tokens of one image before they have positions in a prompt: which part of the image each of them shows."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

Spans = Float[np.ndarray, "n 2"]  # start and end, in pixels, of each row or column of a grid


@dataclass(frozen=True)
class TokenLayout:
    """The visual tokens of one image, in the order of the prompt.

    Attributes:
        height, width: Size of the image in pixels.
        tokens: A line a token, from `token_table`: level, row, column, x0, y0, x1, y1.
    """

    height: int
    width: int
    tokens: pd.DataFrame

    @property
    def n_tokens(self) -> int:
        """Number of tokens, those that show no part of the image included."""
        return len(self.tokens)


def token_table(
    row_spans: Spans,
    column_spans: Spans,
    *,
    level: int = 0,
    newlines: bool = False,
    first_row: int = 0,
    first_column: int = 0,
) -> pd.DataFrame:
    """A line a token, row after row: level, row, column, x0, y0, x1, y1. The box of a newline token is NaN.

    Args:
        row_spans: Top and bottom of each row.
        column_spans: Left and right of each column.
        level: 0 for the whole image, 1 for its details.
        newlines: End each row with one more token, which shows nothing.
        first_row: Number of the first row.
        first_column: Number of the first column.
    """
    if newlines:
        column_spans = np.concatenate([column_spans, [[np.nan, np.nan]]])
    row, column = (ids.ravel() for ids in np.indices((len(row_spans), len(column_spans))))
    boxes = {
        "x0": column_spans[column, 0],
        "y0": row_spans[row, 0],
        "x1": column_spans[column, 1],
        "y1": row_spans[row, 1],
    }
    table = pd.DataFrame({"level": level, "row": row + first_row, "column": column + first_column, **boxes})
    table.loc[table["x0"].isna(), ["y0", "y1"]] = np.nan
    return table


def newline_token(row: int, column: int) -> pd.DataFrame:
    """The line of one token that shows nothing."""
    return pd.DataFrame({"level": 0, "row": row, "column": column, **dict.fromkeys(("x0", "y0", "x1", "y1"), np.nan)}, [0])


def spans_between(edges: Float[np.ndarray, " n_plus_1"]) -> Spans:
    """Spans from each edge to the next."""
    return np.stack([edges[:-1], edges[1:]], -1)


def equal_spans(n: int, length: float, n_tiles: int = 1, tile_length: float = 0) -> Spans:
    """Spans of one length, n in each tile. Where they do not fill a tile, its end stays empty, as after a convolution."""
    starts = (tile_length * np.arange(n_tiles)[:, None] + length * np.arange(n)).ravel()
    return np.stack([starts, starts + length], -1)


def resample_spans(spans: Spans, n: int) -> Spans:
    """Adjoining spans over the same length, n in place of `len(spans)`."""
    edges = np.append(spans[:, 0], spans[-1, 1])
    return spans_between(np.interp(np.linspace(0, len(spans), n + 1), np.arange(len(edges)), edges))
