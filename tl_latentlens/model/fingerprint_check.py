"""The check that a model is the one that filled a bank: a few prompts are run again, and other activations are refused."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tl_latentlens.errors import InvalidInputError, ModelMismatchError
from tl_latentlens.model.describe import NO_TOKENIZER, describe_model
from tl_latentlens.model.fingerprint import Fingerprint, fingerprint
from tl_latentlens.model.fingerprint_causes import (
    Models,
    cause,
    cause_in_settings,
    differ_mostly_in_means,
    largest_difference,
    some,
)
from tl_latentlens.model.hook_points import bridge_hook_name, forward_order, sae_input_name
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.user_hooks import user_hook_points, without_user_hooks


def check_fingerprint(
    model: Any, stored: Fingerprint, info: ModelInfo, *, without_means: bool = False, hooked: Sequence[str] = ()
) -> None:
    """Replay the stored prompts and compare, as exactly as the dtype of the bank's model allows (`TOLERANCES`).

    The model is the bank's if it gives the activations without the hooks that a user has on it, or else with them. It runs
    under the settings of torch that hold.

    Args:
        model: The model to check.
        stored: The bank's fingerprint.
        info: The bank's model.
        without_means: Compare activations of the residual stream without their means over d_model, in which raw weights
            and mean-centred ones (center_writing_weights) agree.
        hooked: Where hooks were attached to the bank's model when it was built.

    Raises:
        ModelMismatchError: The model is not the one of the bank, naming both and, where it can be told, cause and remedy.
    """
    models = Models(info, describe_model(model), hooked, user_hook_points(model))
    _require_same_vocabulary_and_sizes(stored, models)

    def compare() -> _Comparison:
        return _compare(model, stored, models, without_means)

    with without_user_hooks(model):
        bare = compare()
    if not bare.names or (models.attached and not compare().names):
        return
    with without_user_hooks(model):
        why = cause_in_settings(model, bare.distance, lambda: compare().distance) or bare.cause(model, models)
    raise ModelMismatchError(f"{models}, and their activations differ at {some(bare.names)}: {why}")


@dataclass(frozen=True)
class _Comparison:
    """The activations of a model beside those of the bank.

    Attributes:
        stored: Activations of the bank, where both are finite.
        replayed: Activations of the model there.
        names: The hook names that differ, in any way; none where the model is the bank's.
        differing: Those that differ where both are finite.
        sae_layer: The first layer with an attached SAE that may explain it; None: no SAE does.
    """

    stored: Fingerprint
    replayed: Fingerprint
    names: list[str]
    differing: list[str]
    sae_layer: int | None

    @property
    def distance(self) -> float:
        """The largest difference, as a share of a vector's length."""
        return largest_difference(self.stored, self.replayed)

    def cause(self, model: Any, models: Models) -> str:
        """Why, where it can be told, and what to do."""
        if not self.differing:
            return (
                f"NaN or inf on one side only, as where a dtype overflows; load the model with dtype={models.bank.dtype}, or "
                "read on with ContextualIndex(bank, allow_mismatch=True)"
            )
        if self.sae_layer is not None:
            return f"SAEs are attached from layer {self.sae_layer} on, which changes them; check without (model.reset_saes())"
        return cause(model, self.stored, self.replayed, self.differing, models)


def _compare(model: Any, stored: Fingerprint, models: Models, without_means: bool) -> _Comparison:
    """The activations of a model, as it runs now, beside the stored ones."""
    replayed = _replay(model, stored, models)
    _require_same_widths(stored, replayed, models)
    overflown = [
        name for name in stored.activations if not np.array_equal(stored.finite_rows(name), replayed.finite_rows(name))
    ]
    stored, replayed = _rows_finite_on_both_sides(stored, replayed)
    if without_means:
        stored, replayed = stored.without_means(), replayed.without_means()
    differing = _differing_hook_names(stored, replayed, models, check_means=not without_means)
    sae_layer = _first_sae_layer(model, stored)
    if sae_layer is not None and (unchanged := _before_saes(model, stored, sae_layer)):
        # An attached SAE changes all activations after it. Those before it are enough to know the model.
        differing = [name for name in differing if name in unchanged]
        overflown = [name for name in overflown if name in unchanged]
        sae_layer = None
    names = [name for name in stored.activations if name in differing or name in overflown]
    return _Comparison(stored, replayed, names, differing, sae_layer)


def _require_same_vocabulary_and_sizes(stored: Fingerprint, models: Models) -> None:
    """Refuse a model that can be told from the bank's without running it."""
    bank, model = models.bank, models.model
    if model.tokenizer != bank.tokenizer and NO_TOKENIZER not in (model.tokenizer, bank.tokenizer):
        raise ModelMismatchError(
            f"another tokenizer: {models}, and their vocabularies differ (sha256 {bank.tokenizer[:8]}… against "
            f"{model.tokenizer[:8]}…); load the model with its own tokenizer, or rebuild the bank"
        )
    if (model.d_model, model.n_layers) != (bank.d_model, bank.n_layers):
        raise ModelMismatchError(f"another model: {models}; load the model that built the bank, or rebuild the bank")
    if (largest := max(map(max, stored.prompts))) >= model.d_vocab:
        raise ModelMismatchError(
            f"another model: {models}, and the bank's token {largest} is past its vocabulary of {model.d_vocab}; load the "
            "model that built the bank, or rebuild the bank"
        )


def _replay(model: Any, stored: Fingerprint, models: Models) -> Fingerprint:
    """The model's own fingerprint, under the hook names of the stored one."""
    known = model.hook_dict
    names_here = {
        name: sae_input_name(name, known) or (name if name in known else bridge_hook_name(name)) for name in stored.activations
    }
    try:
        replayed = fingerprint(model, stored.prompts, list(names_here.values()))
    except (InvalidInputError, KeyError, ValueError) as error:  # TransformerLens 4 has ValueError for hooks that are off
        raise ModelMismatchError(f"{models}, and the model lacks an activation of the bank: {error}") from error
    return replace(replayed, activations={name: replayed.activations[here] for name, here in names_here.items()})


def _require_same_widths(stored: Fingerprint, replayed: Fingerprint, models: Models) -> None:
    for name, rows in stored.activations.items():
        if (width := replayed.activations[name].shape[-1]) != rows.shape[-1]:
            raise ModelMismatchError(
                f"another model: {models}, and {name} is {rows.shape[-1]} wide in the bank and {width} in the model; load the "
                "model that built the bank, or rebuild the bank"
            )


def _rows_finite_on_both_sides(stored: Fingerprint, replayed: Fingerprint) -> tuple[Fingerprint, Fingerprint]:
    """Both fingerprints, without the tokens at which either holds NaN or inf."""
    finite = {name: stored.finite_rows(name) & replayed.finite_rows(name) for name in stored.activations}
    first, second = (
        replace(side, activations={name: rows[finite[name]] for name, rows in side.activations.items()})
        for side in (stored, replayed)
    )
    return first, second


def _differing_hook_names(stored: Fingerprint, replayed: Fingerprint, models: Models, *, check_means: bool) -> list[str]:
    """Hook names at which activations differ by more than noise, or by their means where the weights' centering differs."""
    check_means = check_means and models.bank.centered != models.model.centered
    return [
        name
        for name in stored.activations
        if not stored.agrees(replayed, name, models.bank.dtype)
        or (check_means and differ_mostly_in_means(stored, replayed, name))
    ]


def _first_sae_layer(model: Any, stored: Fingerprint) -> int | None:
    """The first layer with an attached SAE; None where there is none, or where the bank was made with SAEs itself."""
    layers = [forward_order(name)[0] for name in model.hook_dict if name.endswith(".hook_sae_input")]
    return None if not layers or any(".hook_sae_" in name for name in stored.activations) else min(layers)


def _before_saes(model: Any, stored: Fingerprint, sae_layer: int) -> list[str]:
    """The bank's hook names that no attached SAE changes: earlier layers, and the inputs of SAEs."""
    known = model.hook_dict
    return [name for name in stored.activations if sae_input_name(name, known) or forward_order(name)[0] < sae_layer]
