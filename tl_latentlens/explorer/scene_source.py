"""Drawn scenes as images of the page, seen by the embedded vision-language model."""

from secrets import randbelow

import numpy as np

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.vision.scenes.connector import SceneModel
from tl_latentlens.vision.scenes.phrases import article, joined
from tl_latentlens.vision.scenes.render import draw_scenes
from tl_latentlens.vision.scenes.seen import shown_scene
from tl_latentlens.vision.shown_image import ShownImage

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
        title = f"{name}: {joined([article(words) for words in scenes.objects(0)])}"
        return shown_scene(self.model, scenes, title)
