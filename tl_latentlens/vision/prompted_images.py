"""Pictures with a prompt, as a vision-language model is given them by its processor."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.describe import model_device, model_dtype, require_embedded
from tl_latentlens.model.image_tokens import image_positions, image_token_id
from tl_latentlens.views.grids import Pixels
from tl_latentlens.views.optional import pillow
from tl_latentlens.vision.patches import patch_grids
from tl_latentlens.vision.shown_image import ShownImage

_PROCESSOR_PACKAGES = {"PIL": "pillow", "torchvision": "torchvision", "jinja2": "jinja2"}


class PromptedImages:
    """Pictures with a prompt, seen by a vision-language model through its processor."""

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

    @property
    def processor(self) -> Any:
        """The model's processor.

        Raises:
            InvalidInputError: There is none, or it cannot be loaded.
        """
        if self._processor is None:
            self._processor = getattr(self.model, "processor", None) or _load_processor(self.model)
        return self._processor

    def has_placeholder(self, text: str) -> bool:
        """True where the text holds the processor's placeholder; False where it does not, or where there is no processor."""
        try:
            return any(placeholder in text for placeholder in self._placeholders)
        except InvalidInputError:
            return False

    def make_prompt(self, text: str) -> str:
        """The text itself where it has the placeholder; else a user's turn with the image and the text, or both in a row.

        Raises:
            InvalidInputError: Two places for one image, or there is no processor.
        """
        text = text.strip()
        for placeholder in self._placeholders:
            if (n_places := text.count(placeholder)) > 1:
                raise InvalidInputError(
                    f"the prompt has {n_places} places for an image ({placeholder}), and one is read at a time"
                )
            if n_places:
                return text
        if getattr(self.processor, "chat_template", None):
            turn = [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
            prompt = self._framed([{"role": "user", "content": turn}])
            if not self._placeholders or self.has_placeholder(prompt):  # not of templates that know text alone
                return prompt
        return f"{self._placeholder}\n{text}".strip()

    def show(self, picture: Pixels, prompt: str, name: str) -> ShownImage:
        """A picture as the model is given it, with a prompt from `make_prompt`.

        Args:
            picture: The picture.
            prompt: The prompt.
            name: Of the picture, for its title.

        Raises:
            InvalidInputError: A picture that the processor does not take, a prompt without a place for it, more tokens than
                the model reads, or patches whose places the model's config does not tell.
        """
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
        text_ids = ids[ids != self.placeholder_id].cpu().numpy()  # visual tokens are not looked up
        require_embedded(self.model, text_ids, np.array([0, len(text_ids)]))
        mask = image_positions(self.model, ids)
        height, width = picture.shape[:2]
        [grid, *_] = patch_grids(self.model, inputs, tiles=self._tiles(height, width), mask=mask)
        shapes = " and ".join(f"{rows} × {columns}" for rows, columns in grid.shapes)
        center_crop = bool(getattr(getattr(self.processor, "image_processor", None), "do_center_crop", False))
        run = partial(self.model.run_with_hooks, ids.to(model_device(self.model)), **self._other_inputs(inputs))
        title = f"{name}: {width} × {height} pixels, {shapes} visual tokens"
        return ShownImage(picture, grid.on(height, width, center_crop=center_crop), mask, title, run)

    def _framed(self, turns: list[dict[str, Any]]) -> str:
        try:
            return self.processor.apply_chat_template(turns, add_generation_prompt=True)
        except Exception as error:  # a template is a program of its own, which may raise what it likes
            raise InvalidInputError(
                f"the model's chat template does not take an image with a text: {_one_line(error)}; write the whole prompt, "
                f"with {self._placeholder or 'its placeholder'} where the image stands"
            ) from error

    @property
    def _placeholders(self) -> list[str]:
        """What may stand for an image in a prompt: of some processors (Gemma 3's) a token that only begins an image."""
        names = ("image_token", "boi_token")
        return list(dict.fromkeys(str(token) for name in names if (token := getattr(self.processor, name, None))))

    @cached_property
    def _placeholder(self) -> str:
        """The one of `_placeholders` that the processor replaces by visual tokens; empty where there is none."""
        candidates = self._placeholders
        blank = np.zeros((64, 64, 3), np.uint8)
        for candidate in candidates if len(candidates) > 1 else []:
            with suppress(InvalidInputError):
                if (torch.as_tensor(self._process(blank, candidate)["input_ids"]) == self.placeholder_id).sum() > 1:
                    return candidate
        return candidates[0] if candidates else ""

    def _process(self, picture: Pixels, prompt: str) -> Any:
        image, settings = pillow().fromarray(picture), {}
        bos = getattr(getattr(self.processor, "tokenizer", None), "bos_token", None)
        if bos and prompt.startswith(bos):  # a chat template may write it
            settings = {"add_special_tokens": False}
        with _as_input_error():
            return self.processor(images=image, text=prompt, return_tensors="pt", **settings)

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


@contextmanager
def _as_input_error() -> Iterator[None]:
    """Turn errors of a processor into one line. Processors are code of others, and raise all of these for what they refuse."""
    try:
        yield
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
        raise InvalidInputError(f"the model's processor does not take this: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _load_processor(model: Any) -> Any:
    """The processor that belongs to the name of the model that a bridge wraps; the name may be a folder."""
    from transformers import AutoProcessor

    name = getattr(model.original_model.config, "_name_or_path", "")
    by_hand = "give one in Python: make_app(model, banks, processor=AutoProcessor.from_pretrained(name))"
    if not name:
        raise InvalidInputError(f"the model came without its processor, which cuts images for it; {by_hand}")
    try:
        processor = AutoProcessor.from_pretrained(name)
    # Missing files, packages and settings raise all of these.
    except (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        missing = [package for module, package in _PROCESSOR_PACKAGES.items() if find_spec(module) is None]
        install = f"processors may need what is not installed here: pip install {' '.join(missing)}; or " if missing else ""
        raise InvalidInputError(f"the processor of {name} cannot be loaded ({_one_line(error)}); {install}{by_hand}") from error
    if not hasattr(processor, "image_processor"):  # for a model without a processor, transformers gives its tokenizer
        raise InvalidInputError(
            f"{name} has no processor for images; save the model's own there (processor.save_pretrained(folder)), or {by_hand}"
        )
    return processor
