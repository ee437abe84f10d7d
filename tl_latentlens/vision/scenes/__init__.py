"""Scenes whose every patch is known, and the small vision-language model that sees them: `load_demo_vlm`."""

from tl_latentlens.vision.scenes.connector import SceneModel
from tl_latentlens.vision.scenes.loading import load_demo_vlm
from tl_latentlens.vision.scenes.render import Scenes, draw_scenes

__all__ = ["SceneModel", "Scenes", "draw_scenes", "load_demo_vlm"]
