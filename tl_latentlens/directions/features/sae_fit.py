"""Checks that an SAE is of the model whose rows it is read with."""

import re
import warnings
from typing import Any

from tl_latentlens.directions.features.sae import decoder_of, model_name_of
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex


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


def _plain_name(name: str) -> str:
    """The last part of a model's name, small letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").split("/")[-1].lower())
