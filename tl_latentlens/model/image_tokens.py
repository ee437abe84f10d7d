"""The visual tokens in the input of a vision-language model."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError

_IMAGE_FIELDS = ("image_token_id", "image_token_index")
_OTHER_FIELDS = ("video_token_id", "video_token_index", "audio_token_id", "audio_token_index")


def image_positions(model: Any, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """True at the visual tokens, which are the ids that the model replaces by vectors of the image.

    Args:
        model: A TransformerBridge of a vision-language model.
        tokens: The input ids, as the model's processor makes them: one placeholder for each visual token.

    Raises:
        InvalidInputError: A model without an image token (then give a mask), or ids without one.
    """
    placeholder = image_token_id(model)
    tokens = torch.as_tensor(tokens)
    is_visual = (tokens[None] if tokens.ndim == 1 else tokens) == placeholder
    if not is_visual.any():
        raise InvalidInputError(
            f"got ids without an image token ({placeholder}); expected one for each visual token: take the input_ids of the "
            "model's processor, called with the image"
        )
    return is_visual


def image_token_id(model: Any) -> int:
    """The id that stands for a visual token in the input ids of a vision-language model.

    Raises:
        InvalidInputError: The model has none: it reads text only, or is a HookedTransformer.
    """
    placeholders = _config_ids(model, _IMAGE_FIELDS)
    if not placeholders:
        raise InvalidInputError(
            f"this {type(model).__name__} does not say which of its tokens are visual (no image_token_id in its config); give "
            "a mask, True at the visual tokens: positions=mask [batch, pos]"
        )
    return placeholders[0]


def placeholder_ids(model: Any) -> frozenset[int]:
    """The ids that a model replaces by vectors of an image, a video or a sound; none for a model of text."""
    return frozenset(_config_ids(model, (*_IMAGE_FIELDS, *_OTHER_FIELDS)))


def _config_ids(model: Any, fields: tuple[str, ...]) -> list[int]:
    config = getattr(getattr(model, "original_model", None), "config", None)
    return [int(i) for name in fields if (i := getattr(config, name, None)) is not None]
