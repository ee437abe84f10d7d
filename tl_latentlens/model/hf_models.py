"""TransformerLens models of transformers models that are in memory already, without the hub."""

from pathlib import Path
from typing import Any

import torch

from tl_latentlens.model.load_settings import LoadSettings
from tl_latentlens.search.device import as_device


def hooked_of(hf_model: Any, folder: Path, settings: LoadSettings) -> Any:
    """A HookedTransformer with the weights of a transformers model, made without the hub.

    `HookedTransformer.from_pretrained` asks the hub for the config even where the folder holds it.

    Args:
        hf_model: The model.
        folder: Its config and tokenizer.
        settings: Where it is put, and its dtype.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict
    from transformers import AutoTokenizer

    dtype, n_devices = settings.dtype or torch.float32, settings.n_devices or 1
    cfg = get_pretrained_model_config(str(folder), device=str(as_device(settings.device)), dtype=dtype, n_devices=n_devices)
    state = get_pretrained_state_dict(str(folder), cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(folder), move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.move_model_modules_to_device()
    return model.eval()


def bridge_of(hf_model: Any, name: str, folder: Path, settings: LoadSettings) -> Any:
    """A TransformerBridge of a transformers model.

    Args:
        hf_model: The model; where its layers are on several devices, they stay there.
        name: What it is called.
        folder: Its tokenizer.
        settings: The one device that it is moved to, and its dtype.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    given = {setting: value for setting, value in settings.given().items() if setting in ("device", "dtype")}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(name, hf_model=hf_model, tokenizer=tokenizer, **given).eval()
