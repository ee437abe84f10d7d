"""Uploaded pictures as images of the page, seen by a vision-language model through its processor."""

from collections import OrderedDict
from hashlib import sha256
from typing import Any

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.explorer.image_source import MAX_KEPT_IMAGES
from tl_latentlens.views.grids import Pixels
from tl_latentlens.vision.picture_files import read_picture
from tl_latentlens.vision.prompted_images import PromptedImages
from tl_latentlens.vision.shown_image import ShownImage


class UploadSource(PromptedImages):
    """Uploaded pictures, seen by a vision-language model through its processor."""

    def __init__(self, model: Any, processor: Any = None) -> None:
        """For a TransformerBridge; arguments and errors are those of `PromptedImages`."""
        super().__init__(model, processor)
        self._pictures: OrderedDict[str, Pixels] = OrderedDict()

    def keep(self, data: bytes, name: str) -> str:
        """Read a picture file and keep it; returns the name by which `load` gives it.

        Raises:
            MissingExtraError: Pillow is not installed.
            InvalidInputError: It is no picture, or a huge one.
        """
        picture = read_picture(data, name)
        key = f"{name} #{sha256(picture.tobytes()).hexdigest()[:6]}"
        self._pictures[key] = picture
        self._pictures.move_to_end(key)
        while len(self._pictures) > MAX_KEPT_IMAGES:
            self._pictures.popitem(last=False)
        return key

    def load(self, name: str, prompt: str) -> ShownImage:
        """A kept picture by its name, with a prompt.

        Raises:
            InvalidInputError: A picture that is not kept, or what `show` raises.
        """
        if name not in self._pictures:
            raise InvalidInputError(f"{name} is not kept any more; give the file once more")
        return self.show(self._pictures[name], prompt, name.rpartition(" #")[0])
