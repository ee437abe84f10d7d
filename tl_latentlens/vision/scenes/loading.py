"""Load and save the small vision-language model: its encoder and connector, in front of a language model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.loading import load_model
from tl_latentlens.vision.scenes.connector import SceneModel, new_connector
from tl_latentlens.vision.scenes.encoder import PatchEncoder

SCENES_FOLDER = Path(__file__).parents[2] / "data" / "scenes"
_WEIGHTS, TRAINING_RECORD = "weights.safetensors", "training.json"


def load_demo_vlm(kind: str | None = None, *, model: str = "demo") -> SceneModel:
    """A language model with a small vision encoder and a connector before it, which sees scenes of colored shapes.

    It is as a vision-language model is made: encoder and language model frozen, the connector trained on captions alone
    (`tl_latentlens.data.scenes.train`). What each patch shows is known: `tl_latentlens.vision.scenes.draw_scenes`.

    Args:
        kind: Of the language model, as in `load_model`.
        model: The language model: "demo", the embedded one, or "smollm2", SmolLM2-135M (extra `smollm2`).

    Raises:
        InvalidInputError: A model that no connector comes with.
        MissingExtraError: The package that carries the language model is not installed.
    """
    folder = scenes_folder(model)
    if not (folder / _WEIGHTS).is_file():
        raise InvalidInputError(
            f"got model={model!r}; connectors come with 'demo' and 'smollm2'. Train one for another model: "
            "python -m tl_latentlens.data.scenes.train --model MODEL"
        )
    return load_scene_model(load_model(model, kind=kind), folder)


def scenes_folder(model: str) -> Path:
    """The folder for the encoder and connector that come with the package for a language model, by its name."""
    return SCENES_FOLDER if model == "demo" else SCENES_FOLDER / Path(model).name


def load_scene_model(model: Any, folder: Path = SCENES_FOLDER) -> SceneModel:
    """The encoder and connector that `save_scene_model` has written, in front of their language model, of either class.

    Raises:
        InvalidInputError: A language model of another width.
    """
    weights = {name: weight.float() for name, weight in load_file(folder / _WEIGHTS).items()}
    width = len(weights["connector.layers.2.bias"])
    if width != model.cfg.d_model:
        raise InvalidInputError(
            f"got a model of width {model.cfg.d_model}; expected the one of the connector in {folder}, of width {width}"
        )
    parts: dict[str, torch.nn.Module] = {"encoder": PatchEncoder(), "connector": new_connector(model, 0)}
    for part, module in parts.items():
        module.load_state_dict({n.removeprefix(f"{part}."): w for n, w in weights.items() if n.startswith(f"{part}.")})
        module.eval().requires_grad_(False)
    losses = json.loads((folder / TRAINING_RECORD).read_text(encoding="utf-8"))["losses"]
    return SceneModel(model, **parts, losses=losses)  # pyright: ignore[reportArgumentType]


def save_scene_model(scene_model: SceneModel, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write encoder and connector, not the language model; float16 halves the file."""
    parts = {"encoder": scene_model.encoder, "connector": scene_model.connector}
    weights = {f"{part}.{name}": weight for part, module in parts.items() for name, weight in module.state_dict().items()}
    save_file({name: weight.to(dtype).contiguous() for name, weight in weights.items()}, out / _WEIGHTS)
