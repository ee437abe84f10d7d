"""Load and save the small vision-language model: its encoder and connector, in front of a language model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tl_latentlens.model.loading import load_demo_model
from tl_latentlens.vision.scenes.connector import SceneModel, new_connector
from tl_latentlens.vision.scenes.encoder import PatchEncoder

SCENES_FOLDER = Path(__file__).parents[2] / "data" / "scenes"
_WEIGHTS, TRAINING_RECORD = "weights.safetensors", "training.json"


def load_demo_vlm(kind: str | None = None) -> SceneModel:
    """The embedded model with a small vision encoder and a connector before it, which sees scenes of colored shapes.

    It is as a vision-language model is made: encoder and language model frozen, the connector trained on captions alone
    (`tl_latentlens.data.scenes.train`). What each patch shows is known: `tl_latentlens.vision.scenes.draw_scenes`.

    Args:
        kind: Of the language model, as in `load_demo_model`.
    """
    return load_scene_model(load_demo_model(kind))


def load_scene_model(model: Any, folder: Path = SCENES_FOLDER) -> SceneModel:
    """The encoder and connector that `save` has written, in front of their language model, of either class."""
    weights = load_file(folder / _WEIGHTS)
    parts: dict[str, torch.nn.Module] = {"encoder": PatchEncoder(), "connector": new_connector(model, 0)}
    for part, module in parts.items():
        module.load_state_dict({n.removeprefix(f"{part}."): w for n, w in weights.items() if n.startswith(f"{part}.")})
        module.eval().requires_grad_(False)
    losses = json.loads((folder / TRAINING_RECORD).read_text(encoding="utf-8"))["losses"]
    return SceneModel(model, **parts, losses=losses)  # pyright: ignore[reportArgumentType]


def save_scene_model(scene_model: SceneModel, out: Path) -> None:
    """Write encoder and connector, not the language model."""
    parts = {"encoder": scene_model.encoder, "connector": scene_model.connector}
    weights = {f"{part}.{name}": weight for part, module in parts.items() for name, weight in module.state_dict().items()}
    save_file(weights, out / _WEIGHTS)
