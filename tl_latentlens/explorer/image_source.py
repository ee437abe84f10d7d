"""What a source of images offers the page. Nothing here knows of Dash."""

from typing import Protocol

from tl_latentlens.vision.shown_image import ShownImage

MAX_KEPT_IMAGES = 16


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
