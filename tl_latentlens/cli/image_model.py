"""The options of a model that may see images: `demo-vlm` beside what other commands take."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

import tl_latentlens as tll
from tl_latentlens.cli.options import MODEL_HELP, ModelOptions
from tl_latentlens.vision.scenes.loading import load_scene_model

_DEMO_VLM = "demo-vlm"


@dataclass
class ImageModelOptions(ModelOptions):
    """The options of a model that may see images."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"{MODEL_HELP}; `demo-vlm` sees scenes; default: the one that the bank was built with",
        ),
    ] = None

    @property
    def sees_scenes(self) -> bool:
        """True for the embedded vision-language model."""
        return self.model == _DEMO_VLM

    def load_for(self, bank: tll.Bank) -> Any:
        """The named model, or else the one that the bank was built with; `demo-vlm` is what `load_demo_vlm` gives.

        Raises:
            InvalidInputError: It cannot be loaded.
        """
        if not self.sees_scenes:
            return super().load_for(bank)
        self.model = "demo"
        try:
            return load_scene_model(super().load_for(bank))
        finally:
            self.model = _DEMO_VLM
