"""The check that a model is the one that filled a bank: a few prompts are run again, and other activations are refused."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tl_latentlens.errors import InvalidInputError, ModelMismatchError
from tl_latentlens.model.describe import NO_TOKENIZER, describe_model
from tl_latentlens.model.fingerprint import TOLERANCES, Fingerprint, fingerprint
from tl_latentlens.model.hook_points import bridge_hook_name, forward_order, in_residual_stream, sae_input_name
from tl_latentlens.model.info import ModelInfo


@dataclass(frozen=True)
class _Models:
    """The two models that are compared; its text names both.

    Attributes:
        bank: The model of the bank.
        model: The model that is checked.
    """

    bank: ModelInfo
    model: ModelInfo

    def __str__(self) -> str:
        return f"the bank is of {_named(self.bank)}, the model is {_named(self.model)}"


def check_fingerprint(model: Any, stored: Fingerprint, info: ModelInfo, *, without_means: bool = False) -> None:
    """Replay the stored prompts and compare, as exactly as the dtype of the bank's model allows (`TOLERANCES`).

    Args:
        model: The model to check.
        stored: The bank's fingerprint.
        info: The bank's model.
        without_means: Compare activations of the residual stream without their means over d_model, in which raw weights
            and mean-centred ones (center_writing_weights) agree.

    Raises:
        ModelMismatchError: The model is not the one of the bank, naming both and, where it can be told, cause and remedy.
    """
    models = _Models(info, describe_model(model))
    _require_same_vocabulary_and_sizes(stored, models)
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
    if not differing and not overflown:
        return
    named = [name for name in stored.activations if name in differing or name in overflown]
    if not differing:
        cause = (
            f"NaN or inf on one side only, as where a dtype overflows; load the model with dtype={info.dtype}, or read on with "
            "ContextualIndex(bank, allow_mismatch=True)"
        )
    elif sae_layer is not None:
        cause = f"SAEs are attached from layer {sae_layer} on, which changes them; check without (model.reset_saes())"
    else:
        cause = _cause(stored, replayed, differing, models)
    raise ModelMismatchError(
        f"{models}, and their activations differ at {', '.join(named[:3])}{' …' if named[3:] else ''}: {cause}"
    )


def _named(info: ModelInfo) -> str:
    centered = ", mean-centred" if info.centered else ""
    return f"{info.name} ({info.class_name}, {info.n_layers} layers, d_model {info.d_model}, {info.dtype}{centered})"


def _require_same_vocabulary_and_sizes(stored: Fingerprint, models: _Models) -> None:
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


def _replay(model: Any, stored: Fingerprint, models: _Models) -> Fingerprint:
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


def _require_same_widths(stored: Fingerprint, replayed: Fingerprint, models: _Models) -> None:
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


def _differing_hook_names(stored: Fingerprint, replayed: Fingerprint, models: _Models, *, check_means: bool) -> list[str]:
    """Hook names at which activations differ by more than noise, or by their means where the weights' centering differs."""
    check_means = check_means and models.bank.centered != models.model.centered
    return [
        name
        for name in stored.activations
        if not stored.agrees(replayed, name, models.bank.dtype)
        or (check_means and _differ_mostly_in_means(stored, replayed, name))
    ]


def _first_sae_layer(model: Any, stored: Fingerprint) -> int | None:
    """The first layer with an attached SAE; None where there is none, or where the bank was made with SAEs itself."""
    layers = [forward_order(name)[0] for name in model.hook_dict if name.endswith(".hook_sae_input")]
    return None if not layers or any(".hook_sae_" in name for name in stored.activations) else min(layers)


def _before_saes(model: Any, stored: Fingerprint, sae_layer: int) -> list[str]:
    """The bank's hook names that no attached SAE changes: earlier layers, and the inputs of SAEs."""
    known = model.hook_dict
    return [name for name in stored.activations if sae_input_name(name, known) or forward_order(name)[0] < sae_layer]


def _cause(stored: Fingerprint, replayed: Fingerprint, names: Sequence[str], models: _Models) -> str:
    """Why activations differ, where it can be told, and what to do."""
    bank, model = models.bank, models.model
    centered, replayed_centered = stored.without_means(), replayed.without_means()
    only_means = [name for name in names if in_residual_stream(name) and centered.agrees(replayed_centered, name, bank.dtype)]
    unexplained = [name for name in names if name not in only_means]
    of_model, of_bank = ("centred", "raw") if model.centered else ("raw", "centred")
    centering = f"the bank holds {of_bank} activations and the model's weights are {of_model} (center_writing_weights)"
    if not unexplained:
        return (
            f"{centering}; load the model as the bank's was loaded, or let both be compared without their means: "
            "ContextualIndex(bank, transform='center_writing')"
        )
    also = f"{centering}, and without their means " if only_means else ""
    if all(name.endswith(("hook_v", "hook_z")) and _differ_by_a_constant(stored, replayed, name) for name in unexplained):
        return (
            f"{also}they differ by the same vector at every token, as value biases do (fold_value_biases); load the model as "
            "the bank's was loaded"
        )
    coarser = max((bank.dtype, model.dtype), key=lambda dtype: TOLERANCES.get(dtype, 0.0))
    max_rounding = 4 * TOLERANCES.get(coarser, 0.0)
    if model.dtype != bank.dtype and all(_largest_difference(stored, replayed, name) < max_rounding for name in names):
        return (
            f"by about what rounding to {coarser} does; load the model with dtype={bank.dtype}, or read on with "
            "ContextualIndex(bank, allow_mismatch=True)"
        )
    residual = [name for name in stored.activations if in_residual_stream(name)]
    if residual and not any(in_residual_stream(name) for name in unexplained):
        return (
            f"{also}the residual stream is the same, so its weights are processed otherwise (fold_ln, fold_value_biases, "
            "refactor_factored_attn_matrices); load the model as the bank's was loaded"
        )
    weights = "its weights are others"
    if model.name == bank.name:
        weights += " under the same name (a fine-tune, another revision or another checkpoint)"
    return f"{weights}; load the model that built the bank, or rebuild the bank"


def _differ_mostly_in_means(stored: Fingerprint, replayed: Fingerprint, name: str) -> bool:
    """True where most of the difference is each vector's mean over d_model, however small the difference is."""
    difference = replayed.activations[name] - stored.activations[name]
    rest = difference - difference.mean(-1, keepdims=True)
    return bool(in_residual_stream(name) and np.linalg.norm(rest) < 0.5 * np.linalg.norm(difference))


def _differ_by_a_constant(stored: Fingerprint, replayed: Fingerprint, name: str) -> bool:
    """True where the difference is the same vector at every token."""
    difference = replayed.activations[name] - stored.activations[name]
    return bool(np.linalg.norm(difference - difference.mean(0)) < 1e-2 * np.linalg.norm(difference))


def _largest_difference(stored: Fingerprint, replayed: Fingerprint, name: str) -> float:
    """The largest difference of a vector from the stored one, as a share of the stored one's length."""
    rows, replayed_rows = stored.activations[name], replayed.activations[name]
    return float(np.max(np.linalg.norm(replayed_rows - rows, axis=-1) / np.linalg.norm(rows, axis=-1), initial=0.0))
