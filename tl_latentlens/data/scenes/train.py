"""Train the vision-language models of this package.

    python -m tl_latentlens.data.scenes.train
    python -m tl_latentlens.data.scenes.train --model smollm2 --kind bridge

The language model is frozen; the encoder learns from labels, the connector from captions. It takes three minutes on one core
before the embedded model, and three quarters of an hour before SmolLM2-135M.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tl_latentlens.model.loading import load_model
from tl_latentlens.vision.scenes.connector import ConnectorSettings, SceneModel, train_connector
from tl_latentlens.vision.scenes.encoder import trained_encoder
from tl_latentlens.vision.scenes.loading import TRAINING_RECORD, save_scene_model, scenes_folder


def settings_of(model_name: str, seed: int) -> ConnectorSettings:
    """How the connector of a seed is trained: a larger model takes smaller steps, and more of them."""
    return ConnectorSettings(seed) if model_name == "demo" else ConnectorSettings(seed, steps=1000, batch=16)


def trained(model: Any, folder: Path, settings: ConnectorSettings) -> tuple[SceneModel, float]:
    """The vision-language model of a seed, and its encoder's accuracy; what the folder holds is not trained again."""
    encoder, accuracy = trained_encoder(folder / f"encoder-{settings.seed}.pt", settings.seed)
    return train_connector(model, encoder, folder / f"connector-{settings.seed}.pt", settings), accuracy


def main(
    folder: Annotated[
        Path | None, typer.Option(help="for checkpoints, from which a killed training goes on; default: below build")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="for the weights and training.json; default: in the package")] = None,
    model_name: Annotated[str, typer.Option("--model", help="the language model, as load_model takes it")] = "demo",
    kind: Annotated[str | None, typer.Option(help="its class, as load_model takes it")] = None,
    seed: Annotated[int, typer.Option(help="of weights and scenes")] = 0,
) -> None:
    """Train encoder and connector, and write both with how they were trained."""
    folder, out = folder or checkpoint_folder(model_name), out or scenes_folder(model_name)
    for one in (folder, out):
        one.mkdir(parents=True, exist_ok=True)
    settings = settings_of(model_name, seed)
    scene_model, accuracy = trained(load_model(model_name, kind=kind), folder, settings)
    save_scene_model(scene_model, out, torch.float32 if model_name == "demo" else torch.float16)
    record = {
        **vars(settings),
        "encoder_accuracy": accuracy,
        "torch": version("torch"),
        "transformer_lens": version("transformer-lens"),
        "losses": [round(loss, 4) for loss in scene_model.losses],
    }
    (out / TRAINING_RECORD).write_text(json.dumps(record) + "\n")


def checkpoint_folder(model_name: str) -> Path:
    """Where the trainings of a language model are kept by default."""
    return Path("build/scenes" if model_name == "demo" else f"build/scenes-{Path(model_name).name}")


if __name__ == "__main__":
    typer.run(main)
