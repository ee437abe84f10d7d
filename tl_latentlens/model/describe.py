"""A TransformerLens model's description: the check for one, its device, and the record that a bank stores.

A model is recognised by what it has (`cfg`, `hook_dict`, `run_with_hooks`) and never by its class: TransformerLens 3 and 4
share no class for models.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.source import quantization_of, source_of

NO_TOKENIZER = hashlib.sha256(b"").hexdigest()
"""The vocabulary hash of a model without tokenizer."""


def require_model(model: Any) -> None:
    """Check that `model` is a TransformerLens model.

    Raises:
        InvalidInputError: It has no `cfg`, `hook_dict` or `run_with_hooks`; or its weights are on the meta device.
    """
    if not is_model(model):
        raise InvalidInputError(
            f"got a {type(model).__name__}; expected a TransformerLens model (HookedTransformer or TransformerBridge), "
            "for instance TransformerBridge.boot_transformers(name)"
        )
    _require_weights(model)


def _require_weights(model: Any) -> None:
    """Refuse weights on the meta device, which have no numbers; accelerate brings those that it offloaded as they are used."""
    if not isinstance(model, torch.nn.Module):  # it runs elsewhere, as a RemoteBridge
        return
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise InvalidInputError(
            f"got a model with weights on the meta device, which holds no numbers (the first is {empty}); load them onto a "
            "device (from_pretrained, or to_empty and load_state_dict)"
        )


def is_model(thing: Any) -> bool:
    """True for an object that can be used as a TransformerLens model."""
    # The class is asked first, because the hook_dict of a bridge is a property that takes milliseconds.
    return all(hasattr(type(thing), name) or hasattr(thing, name) for name in ("run_with_hooks", "cfg", "hook_dict"))


def model_device(model: Any) -> torch.device:
    """The device that takes the tokens: that of the embedding; the CPU for weights that are kept elsewhere until they are used.

    The layers may be on other devices, so whatever meets an activation is moved to the activation's own device.
    """
    devices = (parameter.device for parameter in parameters_of(model))
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def model_dtype(model: Any) -> torch.dtype:
    """The dtype of the weights: that of the embedding; where no weights are on this machine, the one that `cfg` names."""
    dtype = next((parameter.dtype for parameter in parameters_of(model) if parameter.is_floating_point()), None)
    return dtype or getattr(model.cfg, "dtype", None) or torch.float32


def parameters_of(model: Any) -> Iterator[torch.nn.Parameter]:
    """The parameters that are on this machine, those of the embedding first; none of a model that runs elsewhere."""
    if not isinstance(model, torch.nn.Module):
        return
    embedding = getattr(model, "embed", None)
    first = list(embedding.parameters()) if isinstance(embedding, torch.nn.Module) else []
    yield from first
    seen = set(map(id, first))
    yield from (parameter for parameter in model.parameters() if id(parameter) not in seen)


def require_embedded(model: Any, tokens: Int[np.ndarray, " tokens"], starts: Int[np.ndarray, " prompts_and_end"]) -> None:
    """Check that a model has an embedding for every token id of some prompts.

    Args:
        model: A TransformerLens model.
        tokens: Token ids of all prompts, back to back.
        starts: Where each prompt begins, and the end.

    Raises:
        InvalidInputError: Naming the first token that has none, and its prompt.
    """
    if not len(tokens):
        return
    embedding = getattr(model, "W_E", None)
    n_embedded = int(model.cfg.d_vocab if embedding is None else embedding.shape[0])
    if tokens.min() >= 0 and tokens.max() < n_embedded:
        return
    place = int(np.argmax((tokens < 0) | (tokens >= n_embedded)))
    prompt = int(np.searchsorted(starts, place, "right")) - 1
    token_id = int(tokens[place])
    token = None if model.tokenizer is None else model.tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
    name = f"token {token_id}" if token is None else f"token {token_id}, {token!r},"
    raise InvalidInputError(
        f"text {prompt} has {name} at position {place - int(starts[prompt])}; the model embeds ids 0 to {n_embedded - 1:,}, so "
        "the tokenizer has tokens that the model has no vectors for. Use the tokenizer that the model came "
        "with, or resize the embedding before the model is loaded"
    )


def describe_model(model: Any) -> ModelInfo:
    """The description by which a bank names its model.

    Raises:
        InvalidInputError: `model` is no TransformerLens model.
    """
    require_model(model)
    cfg, embedding = model.cfg, getattr(model, "W_E", None)
    name = str(getattr(cfg, "model_name", "custom"))
    vocabulary = json.dumps(sorted(model.tokenizer.get_vocab().items())) if model.tokenizer is not None else ""
    return ModelInfo(
        name=Path(name).name if Path(name).is_dir() else name,  # a local folder is named by its last part alone
        class_name=type(model).__name__,
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        d_vocab=int(cfg.d_vocab),
        n_ctx=int(cfg.n_ctx),
        dtype=str(model_dtype(model)).removeprefix("torch."),
        centered=embedding is not None and _is_centered(embedding.detach().float()),
        tokenizer=hashlib.sha256(vocabulary.encode()).hexdigest(),
        source=source_of(model),
        quantization=quantization_of(model),
    )


def _is_centered(embedding: Float[Tensor, "d_vocab d_model"]) -> bool:
    """True where the mean over d_model was removed from each row of the embedding.

    The mean of a raw row is about its length / d_model. The mean of a centered row that was rounded to bfloat16 is 1 % of that.
    """
    length = torch.linalg.vector_norm(embedding) / embedding.shape[0] ** 0.5
    return bool(embedding.mean(-1).abs().max() * embedding.shape[1] < 0.1 * length)
