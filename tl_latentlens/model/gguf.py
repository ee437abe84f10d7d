"""GGUF files: models in one file, their weights quantized or not, which transformers reads and turns into floats."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tl_latentlens.errors import MissingExtraError
from tl_latentlens.model.load_settings import LoadSettings

_MAGIC = b"GGUF"


@dataclass(frozen=True, eq=False)
class GGUFModel:
    """A model that was read from a GGUF file.

    Attributes:
        name: The file's name without its ending.
        quantization: The types of its weights in the file, that of the most weights first: "Q4_1, Q8_0, F32".
        hf_model: The transformers model; its weights are floats.
        tokenizer: Its tokenizer.
    """

    name: str
    quantization: str
    hf_model: Any
    tokenizer: Any

    def save_without_weights(self, folder: str | Path) -> None:
        """Write config and tokenizer in Hugging Face format, from which TransformerLens reads them."""
        self.hf_model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def is_gguf_file(path: str | Path) -> bool:
    """True for a file that begins as GGUF files do."""
    path = Path(path).expanduser()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_gguf(path: Path, settings: LoadSettings) -> GGUFModel:
    """The model in a GGUF file.

    Args:
        path: The file.
        settings: The dtype of the weights, and the devices that they go to where a device map is asked for.

    Raises:
        MissingExtraError: The package gguf is not installed.
        ValueError: A file that is cut off, or an architecture that transformers does not read from GGUF.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError('reading a GGUF file needs gguf: pip install "tl-latentlens[gguf]"') from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    head = gguf.GGUFReader(path)
    n_weights = Counter[str]()
    for tensor in head.tensors:
        n_weights[tensor.tensor_type.name] += int(tensor.n_elements)
    file = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    placed = {name: value for name, value in settings.given().items() if name in ("device_map", "max_memory")}
    # transformers reads the file's head three times, which takes seconds each time: its vocabulary is in it, token by token.
    # It also lists the names of tensors for every module of the model, always the same ones.
    name_map = cache(gguf.get_tensor_name_map)
    with patch.object(gguf, "GGUFReader", lambda *_: head), patch.object(gguf, "get_tensor_name_map", name_map):
        hf_model: Any = AutoModelForCausalLM.from_pretrained(**file, dtype=settings.dtype or torch.float32, **placed)
        tokenizer = AutoTokenizer.from_pretrained(**file)
    # The weights are floats now, and transformers saves no config of a model that says otherwise.
    hf_model.hf_quantizer = None
    if hasattr(hf_model.config, "quantization_config"):
        del hf_model.config.quantization_config
    hf_model.config.architectures = [type(hf_model).__name__]
    return GGUFModel(path.stem, ", ".join(name for name, _ in n_weights.most_common()), hf_model, tokenizer)
