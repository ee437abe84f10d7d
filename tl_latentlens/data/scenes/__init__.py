"""Weights of the embedded vision-language model, and the script that trained it; its code is `tl_latentlens.vision.scenes`."""

from tl_latentlens.vision.scenes import SceneModel, Scenes, draw_scenes

__all__ = ["SceneModel", "Scenes", "draw_scenes"]
