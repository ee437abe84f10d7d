"""The patch grid of each image of a run, from the model's config and the processor's outputs.

Running the model and decoding its activations are left to `lens`, pictures of them to `image_page`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.image_tokens import image_positions
from tl_latentlens.vision.model_layouts import GIVE_SHAPES, image_layouts
from tl_latentlens.vision.patch_grid import PatchGrid
from tl_latentlens.vision.token_layout import TokenLayout


def patch_grids(
    model: Any,
    inputs: Any,
    *,
    tiles: Sequence[tuple[int, int]] | None = None,
    shapes: Sequence[tuple[int, int]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
) -> list[PatchGrid]:
    """The grid of visual tokens of each image of a run, in the order of the images.

    >>> inputs = processor(images=image, text=prompt, return_tensors="pt")      # doctest: +SKIP
    >>> [grid] = patch_grids(bridge, inputs)
    >>> grid.boxes[grid.token(17)]

    Args:
        model: A TransformerBridge of a vision-language model.
        inputs: The processor's outputs: `input_ids`, and where the number of tokens depends on the image, `image_grid_thw`
            (Qwen-VL), `image_sizes` (LLaVA-NeXT, Mistral 3) or `image_position_ids` (Gemma 4). For other models the ids alone
            will do.
        tiles: For models that cut an image into tiles (Idefics3, Llama 4): rows and columns of tiles of each image; (1, 1)
            for one that was left whole.
        shapes: Rows and columns of each image's tokens, where the config does not tell.
        mask: True at the visual tokens; None: where the ids are the model's image token.

    Raises:
        InvalidInputError: Something is missing that the grid depends on, or the ids hold another number of visual tokens
            than the images have.
    """
    fields = inputs if isinstance(inputs, Mapping) or hasattr(inputs, "keys") else {"input_ids": inputs}
    if mask is None:
        if "input_ids" not in fields:
            raise InvalidInputError(f"got inputs with {list(fields.keys())}; expected input_ids among them, or a mask")
        mask = image_positions(model, fields["input_ids"])
    is_visual = torch.as_tensor(mask).cpu().numpy()
    config = getattr(getattr(model, "original_model", None), "config", None)
    images = image_layouts(config, fields, tiles, shapes, is_visual)
    grids = _assign_positions(images.layouts, is_visual)
    if images.n_images is not None and len(grids) < images.n_images:
        raise InvalidInputError(
            f"got {images.n_images} images and visual tokens for {len(grids)}; expected the ids of all of them"
        )
    return grids


def _assign_positions(layouts: Iterator[TokenLayout], is_visual: Bool[np.ndarray, "batch pos"]) -> list[PatchGrid]:
    """A grid for each image: layouts take the visual positions of each prompt in order.

    Raises:
        InvalidInputError: A prompt has too few or too many visual tokens.
    """
    grids = []
    for batch, line in enumerate(is_visual):
        positions = np.flatnonzero(line)
        while len(positions):
            layout = next(layouts, None)
            if layout is None or layout.n_tokens > len(positions):
                expected = "no further image" if layout is None else f"an image of {layout.n_tokens}"
                raise InvalidInputError(
                    f"prompt {batch} has {len(positions)} more visual tokens after {len(grids)} images; expected {expected}: "
                    f"ids and images must come from one call of the processor, or {GIVE_SHAPES}"
                )
            grids.append(PatchGrid.from_layout(layout, positions[: layout.n_tokens], batch))
            positions = positions[layout.n_tokens :]
    return grids
