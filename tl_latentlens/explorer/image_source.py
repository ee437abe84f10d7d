"""An image as a model is given it, and what a source of images offers the page. Nothing here knows of Dash."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.views.grids import Pixels
from tl_latentlens.vision.patch_grid import PatchGrid

MAX_KEPT_IMAGES = 16


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


class ImageSource(Protocol):
    """A source of the page's images."""

    def make_prompt(self, text: str) -> str:
        """The prompt that a model is given with an image, from the text that was typed."""
        ...

    def has_placeholder(self, text: str) -> bool:
        """True for a prompt that has a place for an image."""
        ...

    def load(self, name: str, prompt: str) -> ShownImage:
        """An image by its name, with a prompt from `make_prompt`."""
        ...
