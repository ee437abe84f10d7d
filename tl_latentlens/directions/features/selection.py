"""The features of an SAE that are to be labelled, and the hook names whose rows are used; `label_scores` has the scores."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.directions.features.sae import can_encode, decoder_of, hook_names_of, nonzero_features, require_sae
from tl_latentlens.directions.features.sae_fit import require_width, warn_of_other_model
from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.index.contextual import ContextualIndex


@dataclass(frozen=True, eq=False)
class FeatureSelection:
    """The features of an SAE that are to be labelled.

    Attributes:
        sae: The SAE, or W_dec itself.
        decoder: W_dec, [d_sae, d_in].
        is_nonzero: False where a decoder row is zero.
        requested: The feature numbers asked for, each once.
        searched_hook: The hook name whose rows are searched; None: the rows of all hook names.
        encoded_hook: The hook name whose rows the encoder reads; None without an encoder, or without such rows.
    """

    sae: Any
    decoder: Float[Tensor, "d_sae d_in"]
    is_nonzero: Bool[np.ndarray, " d_sae"]
    requested: list[int]
    searched_hook: str | None
    encoded_hook: str | None

    @property
    def has_direction(self) -> Bool[np.ndarray, " requested"]:
        """False for the requested features whose decoder row is zero."""
        return self.is_nonzero[np.array(self.requested, np.int64)]

    @cached_property
    def ids(self) -> list[int]:
        """The requested features that have a direction."""
        return [feature for feature in self.requested if self.is_nonzero[feature]]

    @property
    def directions(self) -> Float[Tensor, "f d_in"]:
        """The decoder rows of `ids`."""
        return self.decoder[self.ids]

    @property
    def all_ids(self) -> Int[np.ndarray, " nonzero"]:
        """All features of the SAE that have a direction, requested or not."""
        return np.flatnonzero(self.is_nonzero)


def select_features(
    sae: Any, index: ContextualIndex, features: Sequence[int] | None, hook_name: str | None
) -> FeatureSelection:
    """The requested features, checked.

    Warns two calls up where the index lacks the activations that the encoder reads, or where the SAE names another model.

    Args:
        sae: An SAE, or W_dec itself.
        index: The rows.
        features: Feature numbers; None: all.
        hook_name: The activation that the SAE reads and writes; None: the ones that the SAE names.

    Raises:
        InvalidInputError: No decoder, NaN or inf in it, a feature out of range, or an SAE of another width than the rows.
        UnknownHookError: `hook_name` is not in the index.
    """
    require_sae(sae)
    decoder = decoder_of(sae)
    _require_finite(decoder)
    requested = list(range(len(decoder))) if features is None else _feature_numbers(features)
    out_of_range = [feature for feature in requested if not 0 <= feature < len(decoder)]
    if out_of_range:
        raise InvalidInputError(f"got feature {out_of_range[0]}; the SAE has features 0 to {len(decoder) - 1}")
    if hook_name is not None and hook_name not in index.hook_names:
        raise UnknownHookError(f"the index has no hook name {hook_name!r}; it has {list(index.hook_names)}")
    encoder_hook, decoder_hook = hook_names_of(sae) if hook_name is None else (hook_name, hook_name)
    searched_hook = decoder_hook if decoder_hook in index.hook_names else None
    is_nonzero = nonzero_features(sae)
    has_encoder = can_encode(sae) and bool(is_nonzero.any())
    encoded_hook = searched_hook if has_encoder and encoder_hook == searched_hook else None
    require_width(sae, index, searched_hook)
    warn_of_other_model(sae, index, stacklevel=3)
    if has_encoder and encoded_hook is None:
        warnings.warn(
            "no activations to encode, so no density, no AUROC and no max-activating rows: the SAE reads "
            f"{encoder_hook} and writes {decoder_hook}, the index holds {list(index.hook_names)}; "
            "pass hook_name= where it is one of those",
            stacklevel=3,
        )
    return FeatureSelection(sae, decoder, is_nonzero, requested, searched_hook, encoded_hook)


def _require_finite(decoder: Float[Tensor, "d_sae d_in"]) -> None:
    is_finite = torch.isfinite(decoder).all(-1)
    if not bool(is_finite.all()):
        bad = torch.nonzero(~is_finite)[:, 0].tolist()
        raise InvalidInputError(
            f"W_dec holds NaN or inf in {len(bad)} rows, first {bad[:5]}; check the SAE's weights and dtype"
        )


def _feature_numbers(features: Sequence[int]) -> list[int]:
    array = np.asarray(features)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise InvalidInputError(f"got features {features!r}; expected a list of feature numbers, or None for all")
    return list(dict.fromkeys(array.tolist()))
