"""Checks that an SAE is of the model whose rows it is read with, and that its encoder reads each row by itself."""

import re
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.directions.features.sae import TensorSAE, decoder_of, encode, model_name_of
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex

_N_PROBE_ROWS = 15  # Zeros that are encoded beside an activation.
_MAX_CHANGED = 0.2  # Share of the active features that rounding may change.


def require_width(sae: Any, index: ContextualIndex, hook_name: str | None) -> None:
    """Check that W_dec has the width of the rows.

    Args:
        sae: An SAE, or W_dec itself.
        index: The rows.
        hook_name: The hook name whose rows are searched; None: those of any width that the index has.

    Raises:
        InvalidInputError: It has another; the message names both models.
    """
    width = decoder_of(sae).shape[1]
    widths = sorted({index.d(name) for name in index.hook_names if hook_name in (None, name)})
    if width not in widths:
        trained_on = f"trained on {model_name_of(sae)!r}, " if model_name_of(sae) else ""
        of_bank = " and ".join(map(str, widths))
        raise InvalidInputError(
            f"got an SAE ({trained_on}W_dec of width {width}); the bank is of {index.model_info.name!r} and "
            f"{hook_name or 'its rows'} {'has' if hook_name else 'have'} width {of_bank}; the SAE is of another model or "
            "activation: take a bank of its own"
        )


def warn_of_other_model(sae: Any, index: ContextualIndex, stacklevel: int = 2) -> None:
    """Warn where an SAE says that it was trained on another model than the bank's.

    One model has many names: a folder, a hub's name, an alias. Names are the same where one holds the other, in letters and
    digits. Two models of one width differ in nothing else that an SAE tells, so this is no error.
    """
    trained_on, bank_model = model_name_of(sae), index.model_info.name
    names = [_plain_name(name) for name in (trained_on, bank_model) if name]
    if len(names) == 2 and names[0] not in names[1] and names[1] not in names[0]:
        warnings.warn(
            f"the SAE says that it was trained on {trained_on!r}, the bank is of {bank_model!r}; if these are not one model, "
            "its features mean nothing here",
            stacklevel=stacklevel + 1,
        )


def require_encoder_of_rows(sae: Any, activation: Float[Tensor, "1 d_in"]) -> None:
    """Check that an encoder gives an activation the same features alone and among others.

    An SAE in training by batches (BatchTopK) does not, nor does one that reads whole texts (Temporal). `load_sae` gives none of
    these.

    Args:
        sae: What `label_features` takes, with an encoder.
        activation: One that is not zero.

    Raises:
        InvalidInputError: It does not.
    """
    if isinstance(sae, TensorSAE):
        return
    others = torch.zeros_like(activation).expand(_N_PROBE_ROWS, -1)
    try:
        alone, among = encode(sae, activation)[0], encode(sae, torch.cat([activation, others]))[0]
    except ValueError as error:  # Of the axes that an encoder expects.
        raise InvalidInputError(
            f"the encoder of {type(sae).__name__} does not take activations [n, d_in] ({error}); pass its W_dec alone"
        ) from error
    n_active = int(((alone != 0) | (among != 0)).sum())
    if int(((alone != 0) != (among != 0)).sum()) > _MAX_CHANGED * n_active:
        raise InvalidInputError(
            f"the encoder of {type(sae).__name__} gives an activation other features alone than among others; expected an SAE "
            "for inference: save it with save_inference_model and load that, or pass its W_dec alone"
        )


def _plain_name(name: str) -> str:
    """The last part of a model's name, small letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").split("/")[-1].lower())
