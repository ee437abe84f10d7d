"""Train the embedded vision-language model: `python -m tl_latentlens.data.scenes.train --folder build/scenes`.

The language model is frozen; the encoder learns from labels, the connector from captions. It takes three minutes on one core.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from tl_latentlens.model.loading import load_demo_model
from tl_latentlens.vision.scenes.connector import ConnectorSettings, SceneModel, train_connector
from tl_latentlens.vision.scenes.encoder import trained_encoder
from tl_latentlens.vision.scenes.loading import SCENES_FOLDER, TRAINING_RECORD, save_scene_model


def trained(model: Any, folder: Path, settings: ConnectorSettings) -> tuple[SceneModel, float]:
    """The vision-language model of a seed, and its encoder's accuracy; what the folder holds is not trained again."""
    encoder, accuracy = trained_encoder(folder / f"encoder-{settings.seed}.pt", settings.seed)
    return train_connector(model, encoder, folder / f"connector-{settings.seed}.pt", settings), accuracy


def main(
    folder: Annotated[Path, typer.Option(help="for checkpoints, from which a killed training goes on")] = Path("build/scenes"),
    out: Annotated[Path, typer.Option(help="for the weights and training.json")] = SCENES_FOLDER,
    seed: Annotated[int, typer.Option(help="of weights and scenes")] = 0,
) -> None:
    """Train encoder and connector, and write both with how they were trained."""
    for one in (folder, out):
        one.mkdir(parents=True, exist_ok=True)
    settings = ConnectorSettings(seed)
    scene_model, accuracy = trained(load_demo_model(), folder, settings)
    save_scene_model(scene_model, out)
    record = {
        **vars(settings),
        "encoder_accuracy": accuracy,
        "torch": version("torch"),
        "transformer_lens": version("transformer-lens"),
        "losses": [round(loss, 4) for loss in scene_model.losses],
    }
    (out / TRAINING_RECORD).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    typer.run(main)
