"""Which patches of an image to show: those that are named, at a point or in a box; or the clearest, spread over the image."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.vision.patch_grid import PatchGrid

_SIDE = 3  # The image is cut into 3 × 3 parts, and a patch of each is shown.


def named_patches(
    grid: PatchGrid,
    patches: Sequence[int] = (),
    points: Sequence[Sequence[float]] = (),
    boxes: Sequence[Sequence[float]] = (),
) -> Int[np.ndarray, " tokens"]:
    """The tokens (numbers in the grid) that are named, show a point or lie in a box, each once, in the order of the grid.

    Args:
        grid: On the image whose pixels the points and boxes are in.
        patches: Numbers in the grid.
        points: x and y of each.
        boxes: Left, top, right and bottom of each. A patch that a box holds less than half of is left out.

    Raises:
        InvalidInputError: A number that the grid lacks, a token that shows nothing (a newline), a point outside, or a box that
            holds no patch.
    """
    is_patch = grid.is_patch
    for patch in patches:
        if not 0 <= patch < len(grid):
            raise InvalidInputError(f"got patch {patch}; this image has patches 0 to {len(grid) - 1}")
        if not is_patch[patch]:
            raise InvalidInputError(f"visual token {patch} shows no part of the image; it ends a row")
    chosen = [np.array(patches, np.int64)]
    for x, y in points:
        chosen.append(grid.at(x, y))
        if not len(chosen[-1]):
            raise InvalidInputError(f"no patch shows the point {x:g}, {y:g}; {_seen_part(grid)}")
    for box in boxes:
        chosen.append(grid.inside(box))
        if not len(chosen[-1]):
            edges = ", ".join(f"{edge:g}" for edge in box)
            raise InvalidInputError(f"no patch lies in the box {edges} with half of its area or more; {_seen_part(grid)}")
    return np.unique(np.concatenate(chosen))


def clearest_patches(grid: PatchGrid, scores: Float[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
    """Of each ninth of the image the token with the highest score, at the finest level, in the order of the grid."""
    level = grid.levels[grid.is_patch].max()
    tokens = np.flatnonzero(grid.is_patch & (grid.levels == level))
    rows, columns = grid.rows[tokens], grid.columns[tokens]
    parts = _SIDE * (_SIDE * rows // (rows.max() + 1)) + _SIDE * columns // (columns.max() + 1)
    order = np.lexsort((-scores[tokens], parts))
    _, first = np.unique(parts[order], return_index=True)
    return np.sort(tokens[order][first])


def _seen_part(grid: PatchGrid) -> str:
    boxes = grid.boxes[grid.is_patch]
    left, top = boxes[:, :2].min(0)
    right, bottom = boxes[:, 2:].max(0)
    size = f"the image has {grid.width} × {grid.height} pixels"
    is_whole = max(left, top, grid.width - right, grid.height - bottom) < 1
    return size if is_whole else f"{size}, of which the model sees {left:.0f}, {top:.0f} to {right:.0f}, {bottom:.0f}"
