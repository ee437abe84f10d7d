"""A scene, drawn or read from a picture, as the embedded vision-language model is given it."""

from functools import partial

import numpy as np
import torch

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.views.grids import Pixels
from tl_latentlens.vision.image_page import pixels
from tl_latentlens.vision.patch_grid import PatchGrid
from tl_latentlens.vision.scenes.connector import SceneModel
from tl_latentlens.vision.scenes.render import GRID, PATCH, Scenes
from tl_latentlens.vision.shown_image import ShownImage


def shown_scene(scene_model: SceneModel, scenes: Scenes, title: str) -> ShownImage:
    """The first of some scenes as the model is given it."""
    mask = torch.tensor([[False, *[True] * GRID**2]])  # BOS stands before the visual tokens
    picture = pixels(scenes.images[0])
    grid = PatchGrid.regular(GRID, GRID, mask, height=picture.shape[0], width=picture.shape[1])
    return ShownImage(picture, grid, mask, title, partial(scene_model.run_with_hooks, scenes))


def scene_of_picture(picture: Pixels, name: str) -> Scenes:
    """A picture as a scene of which nothing is known but how it looks.

    Raises:
        InvalidInputError: It is not of the size of a scene.
    """
    height, width = picture.shape[:2]
    side = GRID * PATCH
    if (height, width) != (side, side):
        raise InvalidInputError(
            f"{name} has {width} × {height} pixels; the embedded model sees scenes of {side} × {side}, as "
            "tl_latentlens.vision.scenes.draw_scenes draws them; for photos give a vision-language model"
        )
    unknown = np.full((1, GRID**2), -1)
    return Scenes(unknown, unknown, (picture[None] / 255).astype(np.float32))
