"""Images that the explore page can read: uploads, as a model's processor hands them over, or scenes of the embedded model.

Both give a `Seen`, which the `Reader` runs with lens hooks; nothing here knows of Dash.
"""

import io
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from secrets import randbelow
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.image_tokens import image_positions, image_token_id
from tl_latentlens.views.grids import Pixels
from tl_latentlens.views.optional import pillow
from tl_latentlens.vision.image_page import pixels
from tl_latentlens.vision.patch_grid import PatchGrid
from tl_latentlens.vision.patches import patch_grids
from tl_latentlens.vision.scenes.connector import SceneModel
from tl_latentlens.vision.scenes.phrases import article, joined
from tl_latentlens.vision.scenes.render import GRID, draw_scenes

KEPT = 16  # pictures
_LARGEST = 1600  # pixels of a picture's longer side; larger ones are made smaller before the model sees them
_MOST_PIXELS = 64_000_000  # of a file; more would be gigabytes before they are made smaller
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")  # Pillow knows others, which run programs, or fetch
_SCENES = 100_000  # numbers of scenes to choose from


@dataclass(frozen=True, eq=False)
class Seen:
    """An image as a model is given it.

    Attributes:
        picture: What is shown.
        grid: Which visual token shows which part of the picture.
        mask: True at the visual tokens.
        title: What the image is called, and what is known of it.
        run: Runs the model on it; takes `fwd_hooks`.
    """

    picture: Pixels
    grid: PatchGrid
    mask: Bool[Tensor, "batch pos"]
    title: str
    run: Callable[..., Any]


class Images(Protocol):
    """Where the page's images come from."""

    def prompt(self, text: str) -> str:
        """The prompt that a model is given with an image, from what was typed."""
        ...

    def asks_for_image(self, text: str) -> bool:
        """True for a prompt that has a place for an image."""
        ...

    def seen(self, name: str, text: str) -> Seen:
        """An image by its name, with a prompt that `prompt` gave."""
        ...


class SceneImages:
    """Drawn scenes, seen by the embedded vision-language model; each is known by its number, and has no prompt."""

    def __init__(self, scene_model: "SceneModel") -> None:
        """For what `load_demo_vlm` gives."""
        self.model = scene_model

    def new(self) -> str:
        """The name of some scene."""
        return f"scene {randbelow(_SCENES)}"

    def prompt(self, text: str) -> str:
        """There is none."""
        return ""

    def asks_for_image(self, text: str) -> bool:
        """Its language model knows no placeholder."""
        return False

    def seen(self, name: str, text: str) -> Seen:
        """A scene by its name, "scene 7".

        Raises:
            InvalidInputError: No such name.
        """
        number = name.removeprefix("scene ")
        if not number.isdecimal():
            raise InvalidInputError(f"got {name!r}; this page's model sees scenes: choose New scene")
        scenes = draw_scenes(1, np.random.default_rng(int(number)))
        mask = torch.tensor([[False, *[True] * GRID**2]])  # BOS stands before them
        picture = pixels(scenes.images[0])
        grid = PatchGrid.regular(GRID, GRID, mask, height=picture.shape[0], width=picture.shape[1])
        title = f"{name}: {joined([article(words) for words in scenes.objects(0)])}"
        return Seen(picture, grid, mask, title, partial(self.model.run_with_hooks, scenes))


class Uploads:
    """Uploaded pictures, seen by a vision-language model through its processor."""

    def __init__(self, model: Any, processor: Any = None) -> None:
        """For a TransformerBridge.

        Args:
            model: Which sees.
            processor: As transformers gives it; None: the one that the bridge was loaded with, or that its name leads to.

        Raises:
            InvalidInputError: The model has no visual tokens.
        """
        self.placeholder_id = image_token_id(model)
        self.model = model
        self._given = processor
        self._pictures: OrderedDict[str, Pixels] = OrderedDict()

    @property
    def processor(self) -> Any:
        """The model's processor.

        Raises:
            InvalidInputError: There is none, or it cannot be loaded.
        """
        if self._given is None:
            self._given = getattr(self.model, "processor", None) or _loaded_processor(self.model)
        return self._given

    def keep(self, data: bytes, name: str) -> str:
        """Read a picture file and keep it; what it is called from now on.

        Raises:
            MissingExtraError: Pillow is not installed.
            InvalidInputError: It is no picture, or a huge one.
        """
        picture = read_picture(data, name)
        key = f"{name} #{sha256(picture.tobytes()).hexdigest()[:6]}"
        self._pictures[key] = picture
        self._pictures.move_to_end(key)
        while len(self._pictures) > KEPT:
            self._pictures.popitem(last=False)
        return key

    def asks_for_image(self, text: str) -> bool:
        """True where the processor's placeholder stands in the text; False too where there is no processor to ask."""
        try:
            placeholder = self._placeholder
        except InvalidInputError:
            return False
        return bool(placeholder) and placeholder in text

    def prompt(self, text: str) -> str:
        """The text where it has the placeholder; else it becomes a user's turn with the image, or the image is put before it.

        Raises:
            InvalidInputError: Two places for one image, or there is no processor.
        """
        placeholder, text = self._placeholder, text.strip()
        count = text.count(placeholder) if placeholder else 0
        if count > 1:
            raise InvalidInputError(f"the prompt has {count} places for an image ({placeholder}), and one is read at a time")
        if count:
            return text
        if getattr(self.processor, "chat_template", None):
            turn = [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
            return self.processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        return f"{placeholder}\n{text}".strip() if placeholder else text

    def seen(self, name: str, text: str) -> Seen:
        """A kept picture by its name, with a prompt.

        Raises:
            InvalidInputError: A picture that is not kept, one that the processor does not take, a prompt without a place for
                it, more tokens than the model reads, or patches whose places the model's config does not tell.
        """
        if name not in self._pictures:
            raise InvalidInputError(f"{name} is not kept any more; give the file once more")
        picture = self._pictures[name]
        inputs = self._processed(picture, text)
        ids = torch.as_tensor(inputs["input_ids"])
        if not (ids == self.placeholder_id).any():
            raise InvalidInputError(
                "the prompt has no place for the image: write the model's placeholder where it stands, for instance "
                f"{self._placeholder or '<image>'}"
            )
        if ids.shape[1] > (most := self.model.cfg.n_ctx):
            raise InvalidInputError(
                f"image and prompt have {ids.shape[1]:,} tokens; the model reads {most:,}: shorten the prompt"
            )
        mask = image_positions(self.model, ids)
        height, width = picture.shape[:2]
        [grid, *_] = patch_grids(self.model, inputs, tiles=self._tiles(height, width), mask=mask)
        shapes = " and ".join(f"{rows} × {columns}" for rows, columns in grid.shapes)
        crop = bool(getattr(getattr(self.processor, "image_processor", None), "do_center_crop", False))
        run = partial(self.model.run_with_hooks, ids.to(model_device(self.model)), **self._beside(inputs))
        title = f"{name.rpartition(' #')[0]}: {width} × {height} pixels, {shapes} visual tokens"
        return Seen(picture, grid.on(height, width, center_crop=crop), mask, title, run)

    @property
    def _placeholder(self) -> str:
        return str(getattr(self.processor, "image_token", None) or "")

    def _processed(self, picture: Pixels, text: str) -> Any:
        image, settings = pillow().fromarray(picture), {}
        bos = getattr(getattr(self.processor, "tokenizer", None), "bos_token", None)
        if bos and text.startswith(bos):  # a chat template may write it
            settings = {"add_special_tokens": False}
        try:
            return self.processor(images=image, text=text, return_tensors="pt", **settings)
        # Processors are others' code, and raise all of these for prompts and images that they do not take.
        except (
            ArithmeticError,
            AttributeError,
            ImportError,
            LookupError,
            RuntimeError,
            StopIteration,
            TypeError,
            ValueError,
        ) as error:
            said = (str(error).strip() or "no message").splitlines()[0][:200]
            raise InvalidInputError(f"the model's processor does not take this: {type(error).__name__}: {said}") from error

    def _tiles(self, height: int, width: int) -> list[tuple[int, int]] | None:
        """Rows and columns that Idefics3's processor cuts a picture into; None of processors that do not tell them."""
        count = getattr(getattr(self.processor, "image_processor", None), "get_number_of_image_patches", None)
        told = count(height, width, {}) if count else None
        return [(max(1, told[1]), max(1, told[2]))] if isinstance(told, tuple) and len(told) == 3 else None

    def _beside(self, inputs: Any) -> dict[str, Tensor]:
        """All that the processor gave beside the ids, where the model is, its pixels in the model's dtype."""
        device, dtype = model_device(self.model), next(self.model.parameters()).dtype
        beside = {name: value for name, value in inputs.items() if name != "input_ids" and isinstance(value, Tensor)}
        return {name: one.to(device, dtype if one.is_floating_point() else None) for name, one in beside.items()}


def images_for(model: Any, processor: Any = None) -> Images | None:
    """The images that a model can be shown; None for one that reads text alone.

    Args:
        model: A TransformerLens model, or what `load_demo_vlm` gives.
        processor: Of a vision-language model.

    Raises:
        InvalidInputError: A processor for a model without visual tokens.
    """
    if isinstance(model, SceneModel):
        return SceneImages(model)
    try:
        return Uploads(model, processor)
    except InvalidInputError:
        if processor is not None:
            raise
        return None


def read_picture(data: bytes, name: str) -> Pixels:
    """The picture in a file, upright, on white where it is transparent, and no larger than the page shows it.

    Raises:
        MissingExtraError: Pillow is not installed.
        InvalidInputError: It is no picture, or has too many pixels.
    """
    image = pillow()
    from PIL import ImageOps

    with _readable(name, image.DecompressionBombError):
        opened = image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = opened.size
    if width * height > _MOST_PIXELS:
        raise InvalidInputError(
            f"{name} has {width:,} × {height:,} pixels; at most {_MOST_PIXELS // 10**6} million can be read: make it smaller"
        )
    with _readable(name):
        opened.draft("RGB", (_LARGEST, _LARGEST))  # a JPEG file is read at a fraction of its size
        upright = ImageOps.exif_transpose(opened)
        upright.thumbnail((_LARGEST, _LARGEST))
        whole = upright.convert("RGBA")
        return pixels(image.alpha_composite(image.new("RGBA", whole.size, "white"), whole))


@contextmanager
def _readable(name: str, *others: type[Exception]) -> Iterator[None]:
    """Say in one line that a file cannot be read; damaged ones make Pillow raise all of these."""
    try:
        yield
    except (EOFError, LookupError, OSError, OverflowError, SyntaxError, ValueError, struct.error, zlib.error, *others) as error:
        raise InvalidInputError(f"{name} cannot be read as an image; PNG, JPEG, GIF, WebP, BMP and TIFF files can") from error


def _loaded_processor(model: Any) -> Any:
    """A processor by the name of the model that a bridge wraps, which may be a folder."""
    from transformers import AutoProcessor

    name = getattr(model.original_model.config, "_name_or_path", "")
    by_hand = "make_app(model, banks, processor=AutoProcessor.from_pretrained(name))"
    if not name:
        raise InvalidInputError(f"the model came without its processor, which cuts images for it; give it: {by_hand}")
    try:
        processor = AutoProcessor.from_pretrained(name)
    # Missing files, packages and settings raise all of these.
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        said = (str(error).strip() or "no message").splitlines()[0][:200]
        raise InvalidInputError(
            f"the processor of {name} cannot be loaded ({type(error).__name__}: {said}); or {by_hand}"
        ) from error
    if not hasattr(processor, "image_processor"):  # where there is none, a tokenizer is what comes
        raise InvalidInputError(f"{name} has no processor for images; give one: {by_hand}")
    return processor
