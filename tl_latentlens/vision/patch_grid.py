"""The visual tokens of one image: their positions in the prompt, and the part of the image that each of them shows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.vision.token_layout import TokenLayout, spans_between, token_table


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The visual tokens of one image, in the order of the prompt, and the part of the image that each of them shows.

    Most models see an image once, at level 0. Those that also cut it into tiles or crops (LLaVA-NeXT, Idefics3, Llama 4) see
    the whole image at level 0 and its details, all tiles laid side by side, at level 1.

    Attributes:
        height, width: Size in pixels of the image as the model saw it. `on` moves the boxes to your image.
        positions: Position of each token in its prompt.
        boxes: Left, top, right and bottom of each token in pixels. They are NaN for tokens that show no part of the image, such
            as the newline token that ends each row in LLaVA-NeXT.
        rows, columns: Row and column of each token in its grid, from 0. A newline token stands one past the last column.
        levels: 0 for the whole image, 1 for its details.
        batch: Number of the prompt in the batch that the image is in.
    """

    height: int
    width: int
    positions: Int[np.ndarray, " tokens"]
    boxes: Float[np.ndarray, "tokens 4"]
    rows: Int[np.ndarray, " tokens"]
    columns: Int[np.ndarray, " tokens"]
    levels: Int[np.ndarray, " tokens"]
    batch: int = 0

    @classmethod
    def regular(
        cls, rows: int, columns: int, positions: Any, *, height: int | None = None, width: int | None = None, batch: int = 0
    ) -> "PatchGrid":
        """A grid of equal patches, row after row, for a model whose config does not tell the grid.

        Args:
            rows: Number of rows of the grid.
            columns: Number of columns of the grid.
            positions: Positions of the tokens in their prompt: numbers, or a mask [pos], or a mask [batch, pos], whose line
                `batch` is used.
            height: Height of the image in pixels; None: one a row.
            width: Width of the image in pixels; None: one a column.
            batch: Number of the prompt in the batch.

        Raises:
            InvalidInputError: Not rows × columns positions.
        """
        token_positions = torch.as_tensor(positions).cpu().numpy()
        token_positions = token_positions[batch] if token_positions.ndim == 2 else token_positions
        if token_positions.dtype == bool:
            token_positions = np.flatnonzero(token_positions)
        n_tokens = rows * columns
        if len(token_positions) != n_tokens:
            raise InvalidInputError(
                f"got {len(token_positions)} positions; expected {rows} rows × {columns} columns = {n_tokens}"
            )
        height, width = height or rows, width or columns
        spans = (spans_between(np.linspace(0, size, n + 1)) for size, n in ((height, rows), (width, columns)))
        return cls.from_layout(TokenLayout(height, width, token_table(*spans)), token_positions.astype(np.int64), batch)

    @classmethod
    def from_layout(cls, layout: TokenLayout, positions: Int[np.ndarray, " tokens"], batch: int) -> "PatchGrid":
        """The grid of tokens that have positions now."""
        edges = layout.tokens[["x0", "y0", "x1", "y1"]].to_numpy(np.float64)
        boxes = np.clip(edges, 0, [layout.width, layout.height] * 2)  # a model may pad an image, and show the padding too
        rows, columns, levels = (layout.tokens[name].to_numpy(np.int64) for name in ("row", "column", "level"))
        return cls(layout.height, layout.width, positions, boxes, rows, columns, levels, batch)

    def __len__(self) -> int:
        return len(self.positions)

    def __repr__(self) -> str:
        shapes = " and ".join(f"{rows} × {columns}" for rows, columns in self.shapes)
        return f"PatchGrid({shapes} patches of a {self.width} × {self.height} image, batch {self.batch})"

    @property
    def is_patch(self) -> Bool[np.ndarray, " tokens"]:
        """True for tokens that show a part of the image."""
        return ~np.isnan(self.boxes[:, 0])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each level."""
        masks = (self.is_patch & (self.levels == level) for level in np.unique(self.levels))
        return [(int(self.rows[mask].max()) + 1, int(self.columns[mask].max()) + 1) for mask in masks if mask.any()]

    def at(self, x: float, y: float) -> Int[np.ndarray, " matches"]:
        """The tokens (numbers in this grid) whose box holds a point, in pixels: one for each level."""
        x0, y0, x1, y1 = self.boxes.T
        return np.flatnonzero((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))

    def inside(self, box: Sequence[float], least: float = 0.5) -> Int[np.ndarray, " matches"]:
        """The tokens (numbers in this grid) that lie in a box with at least a share `least` of their own area.

        Args:
            box: Left, top, right and bottom, in pixels.
            least: A share in [0, 1].

        Raises:
            InvalidInputError: A box without area.
        """
        left, top, right, bottom = map(float, box)
        if not (left < right and top < bottom):
            raise InvalidInputError(f"got box={tuple(box)}; expected left < right and top < bottom, in pixels")
        x0, y0, x1, y1 = self.boxes.T
        width, height = np.minimum(x1, right) - np.maximum(x0, left), np.minimum(y1, bottom) - np.maximum(y0, top)
        shared_area = np.clip(width, 0, None) * np.clip(height, 0, None)
        return np.flatnonzero((shared_area > 0) & (shared_area >= least * (x1 - x0) * (y1 - y0)))

    def token(self, position: int) -> int:
        """The number in this grid of the token at a position of the prompt.

        Raises:
            InvalidInputError: The position is not of this image.
        """
        matches = np.flatnonzero(self.positions == position)
        if not len(matches):
            first, last = self.positions[0], self.positions[-1]
            raise InvalidInputError(f"position {position} is no token of this image; its tokens stand from {first} to {last}")
        return int(matches[0])

    def on(self, height: int, width: int, *, center_crop: bool = False) -> "PatchGrid":
        """The same tokens on the image as it was before the processor changed its size.

        Args:
            height: Height of that image, in pixels.
            width: Width of that image, in pixels.
            center_crop: The processor did not squeeze the image but cut out its middle (`do_center_crop`, as CLIP's does
                for LLaVA 1.5).
        """
        scale = np.array([width / self.width, height / self.height])
        if center_crop:
            scale[:] = scale.min()
        margin = (np.array([width, height]) - scale * [self.width, self.height]) / 2
        return replace(self, height=height, width=width, boxes=self.boxes * np.tile(scale, 2) + np.tile(margin, 2))

    def to_dataframe(self) -> pd.DataFrame:
        """One line a token: token, position, level, row, column, x0, y0, x1, y1."""
        table = {"position": self.positions, "level": self.levels, "row": self.rows, "column": self.columns}
        return pd.DataFrame(
            {"token": range(len(self)), **table, **dict(zip(("x0", "y0", "x1", "y1"), self.boxes.T, strict=True))}
        )
