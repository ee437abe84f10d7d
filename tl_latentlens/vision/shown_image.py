"""An image as a model is given it: the picture, its visual tokens, and the run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.views.grids import Pixels
from tl_latentlens.vision.patch_grid import PatchGrid


@dataclass(frozen=True, eq=False)
class ShownImage:
    """An image as a model is given it.

    Attributes:
        picture: The picture that the page shows.
        grid: The visual tokens, and the part of the picture that each of them shows.
        mask: True at the visual tokens.
        title: Name of the image, and what is known of it.
        run: Runs the model on it; takes `fwd_hooks`.
    """

    picture: Pixels
    grid: PatchGrid
    mask: Bool[Tensor, "batch pos"]
    title: str
    run: Callable[..., Any]
