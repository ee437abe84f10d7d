"""Uploaded pictures as images of the page, seen by a vision-language model through its processor."""

from collections import OrderedDict
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.explorer.image_source import MAX_KEPT_IMAGES, ShownImage
from tl_latentlens.explorer.picture_files import read_picture
from tl_latentlens.model.describe import model_device, model_dtype
from tl_latentlens.model.image_tokens import image_positions, image_token_id
from tl_latentlens.views.grids import Pixels
from tl_latentlens.views.optional import pillow
from tl_latentlens.vision.patches import patch_grids


class UploadSource:
    """Uploaded pictures, seen by a vision-language model through its processor."""

    def __init__(self, model: Any, processor: Any = None) -> None:
        """For a TransformerBridge.

        Args:
            model: A bridge of a vision-language model.
            processor: A processor of transformers; None: the one that the bridge was loaded with, or that belongs to its name.

        Raises:
            InvalidInputError: The model has no visual tokens.
        """
        self.placeholder_id = image_token_id(model)
        self.model = model
        self._processor = processor
        self._pictures: OrderedDict[str, Pixels] = OrderedDict()

    @property
    def processor(self) -> Any:
        """The model's processor.

        Raises:
            InvalidInputError: There is none, or it cannot be loaded.
        """
        if self._processor is None:
            self._processor = getattr(self.model, "processor", None) or _load_processor(self.model)
        return self._processor

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

    def has_placeholder(self, text: str) -> bool:
        """True where the text holds the processor's placeholder; False where it does not, or where there is no processor."""
        try:
            placeholder = self._placeholder
        except InvalidInputError:
            return False
        return bool(placeholder) and placeholder in text

    def make_prompt(self, text: str) -> str:
        """The text itself where it has the placeholder; else a user's turn with the image and the text, or both in a row.

        Raises:
            InvalidInputError: Two places for one image, or there is no processor.
        """
        placeholder, text = self._placeholder, text.strip()
        n_places = text.count(placeholder) if placeholder else 0
        if n_places > 1:
            raise InvalidInputError(f"the prompt has {n_places} places for an image ({placeholder}), and one is read at a time")
        if n_places:
            return text
        if getattr(self.processor, "chat_template", None):
            turn = [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
            return self.processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        return f"{placeholder}\n{text}".strip() if placeholder else text

    def load(self, name: str, prompt: str) -> ShownImage:
        """A kept picture by its name, with a prompt.

        Raises:
            InvalidInputError: A picture that is not kept, one that the processor does not take, a prompt without a place for
                it, more tokens than the model reads, or patches whose places the model's config does not tell.
        """
        if name not in self._pictures:
            raise InvalidInputError(f"{name} is not kept any more; give the file once more")
        picture = self._pictures[name]
        inputs = self._process(picture, prompt)
        ids = torch.as_tensor(inputs["input_ids"])
        if not (ids == self.placeholder_id).any():
            raise InvalidInputError(
                "the prompt has no place for the image: write the model's placeholder where it stands, for instance "
                f"{self._placeholder or '<image>'}"
            )
        if ids.shape[1] > (n_ctx := self.model.cfg.n_ctx):
            raise InvalidInputError(
                f"image and prompt have {ids.shape[1]:,} tokens; the model reads {n_ctx:,}: shorten the prompt"
            )
        mask = image_positions(self.model, ids)
        height, width = picture.shape[:2]
        [grid, *_] = patch_grids(self.model, inputs, tiles=self._tiles(height, width), mask=mask)
        shapes = " and ".join(f"{rows} × {columns}" for rows, columns in grid.shapes)
        center_crop = bool(getattr(getattr(self.processor, "image_processor", None), "do_center_crop", False))
        run = partial(self.model.run_with_hooks, ids.to(model_device(self.model)), **self._other_inputs(inputs))
        title = f"{name.rpartition(' #')[0]}: {width} × {height} pixels, {shapes} visual tokens"
        return ShownImage(picture, grid.on(height, width, center_crop=center_crop), mask, title, run)

    @property
    def _placeholder(self) -> str:
        return str(getattr(self.processor, "image_token", None) or "")

    def _process(self, picture: Pixels, prompt: str) -> Any:
        image, settings = pillow().fromarray(picture), {}
        bos = getattr(getattr(self.processor, "tokenizer", None), "bos_token", None)
        if bos and prompt.startswith(bos):  # a chat template may write it
            settings = {"add_special_tokens": False}
        try:
            return self.processor(images=image, text=prompt, return_tensors="pt", **settings)
        # Processors are code of others, and raise all of these for prompts and images that they do not take.
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
            message = (str(error).strip() or "no message").splitlines()[0][:200]
            raise InvalidInputError(f"the model's processor does not take this: {type(error).__name__}: {message}") from error

    def _tiles(self, height: int, width: int) -> list[tuple[int, int]] | None:
        """Rows and columns of tiles that Idefics3's processor cuts a picture into; None where a processor tells none."""
        count_patches = getattr(getattr(self.processor, "image_processor", None), "get_number_of_image_patches", None)
        counts = count_patches(height, width, {}) if count_patches else None  # Idefics3: patches, rows, columns
        return [(max(1, counts[1]), max(1, counts[2]))] if isinstance(counts, tuple) and len(counts) == 3 else None

    def _other_inputs(self, inputs: Any) -> dict[str, Tensor]:
        """All outputs of the processor but the ids, on the model's device; pixels in the model's dtype."""
        device, dtype = model_device(self.model), model_dtype(self.model)
        tensors = {name: value for name, value in inputs.items() if name != "input_ids" and isinstance(value, Tensor)}
        return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()}


def _load_processor(model: Any) -> Any:
    """The processor that belongs to the name of the model that a bridge wraps; the name may be a folder."""
    from transformers import AutoProcessor

    name = getattr(model.original_model.config, "_name_or_path", "")
    by_hand = "make_app(model, banks, processor=AutoProcessor.from_pretrained(name))"
    if not name:
        raise InvalidInputError(f"the model came without its processor, which cuts images for it; give it: {by_hand}")
    try:
        processor = AutoProcessor.from_pretrained(name)
    # Missing files, packages and settings raise all of these.
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        message = (str(error).strip() or "no message").splitlines()[0][:200]
        raise InvalidInputError(
            f"the processor of {name} cannot be loaded ({type(error).__name__}: {message}); or {by_hand}"
        ) from error
    if not hasattr(processor, "image_processor"):  # for a model without a processor, transformers gives its tokenizer
        raise InvalidInputError(f"{name} has no processor for images; give one: {by_hand}")
    return processor
