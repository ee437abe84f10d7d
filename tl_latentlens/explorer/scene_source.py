"""Drawn scenes as images of the page, seen by the embedded vision-language model."""

from functools import partial
from secrets import randbelow

import numpy as np
import torch

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.explorer.image_source import ShownImage
from tl_latentlens.vision.image_page import pixels
from tl_latentlens.vision.patch_grid import PatchGrid
from tl_latentlens.vision.scenes.connector import SceneModel
from tl_latentlens.vision.scenes.phrases import article, joined
from tl_latentlens.vision.scenes.render import GRID, draw_scenes

_N_SCENES = 100_000  # scenes are named by their seed, which is below this number


class SceneSource:
    """Drawn scenes. Each is known by its number, and has no prompt."""

    def __init__(self, scene_model: SceneModel) -> None:
        """For the model that `load_demo_vlm` gives."""
        self.model = scene_model

    def random_name(self) -> str:
        """The name of a scene that is chosen at random."""
        return f"scene {randbelow(_N_SCENES)}"

    def make_prompt(self, text: str) -> str:
        """The empty prompt: scenes have none."""
        return ""

    def has_placeholder(self, text: str) -> bool:
        """False: the language model knows no placeholder."""
        return False

    def load(self, name: str, prompt: str) -> ShownImage:
        """A scene by its name, "scene 7".

        Raises:
            InvalidInputError: No such name.
        """
        number = name.removeprefix("scene ")
        if not number.isdecimal():
            raise InvalidInputError(f"got {name!r}; this page's model sees scenes: choose New scene")
        scenes = draw_scenes(1, np.random.default_rng(int(number)))
        mask = torch.tensor([[False, *[True] * GRID**2]])  # BOS stands before the visual tokens
        picture = pixels(scenes.images[0])
        grid = PatchGrid.regular(GRID, GRID, mask, height=picture.shape[0], width=picture.shape[1])
        title = f"{name}: {joined([article(words) for words in scenes.objects(0)])}"
        return ShownImage(picture, grid, mask, title, partial(self.model.run_with_hooks, scenes))
