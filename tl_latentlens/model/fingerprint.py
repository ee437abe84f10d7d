"""Is this the model that filled the bank? A few prompts are run again, and a model that gives something else is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError, ModelMismatchError
from tl_latentlens.model.describe import NO_TOKENIZER, describe_model, model_device
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.hook_points import bridge_hook_name, forward_order, in_residual_stream, sae_input_name, switch_on_hint
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.running import run_hooked

# Most that activations of the same model may differ when it runs again, as a share of their length, by weight dtype.
TOLERANCES = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Fingerprint:
    """What the model gave for a few prompts: enough to know it again.

    Attributes:
        prompts: Token ids of each prompt, BOS included.
        activations: Hook name → float32 [n_tokens, d], the prompts back to back, heads side by side.
        n_heads: Hook name → heads, for activations that have them.
    """

    prompts: tuple[tuple[int, ...], ...]
    activations: dict[str, Float[np.ndarray, "tokens d"]]
    n_heads: dict[str, int] = field(default_factory=dict)

    def agrees(self, other: "Fingerprint", hook_name: str, dtype: str) -> bool:
        """True where another model's activations are these, up to the noise between devices and batch sizes.

        Row by row: one massive activation, as at BOS, must not hide the others. Rows that are not finite on both sides
        (float16 models overflow at BOS) count as equal.

        Args:
            other: What the other model gave for the same prompts.
            hook_name: The activation to compare.
            dtype: That of the weights which gave `self`; it sets the noise.
        """
        here, there = self.activations[hook_name], other.activations[hook_name]
        if here.shape != there.shape:
            return False
        broken = ~np.isfinite(here).all(-1)
        with np.errstate(invalid="ignore", over="ignore"):
            near = np.linalg.norm(there - here, axis=-1) <= TOLERANCES.get(dtype, 5e-3) * np.linalg.norm(here, axis=-1)
        return bool(np.where(broken, ~np.isfinite(there).all(-1), near).all())


def fingerprint(model: Any, prompts: Sequence[Sequence[int]], hook_names: Sequence[str]) -> Fingerprint:
    """The activations that the model gives for each prompt alone, float32.

    Raises:
        InvalidInputError: A hook name that never fires, or whose activation is not [batch, pos, ...].
    """
    seen: dict[str, list[np.ndarray]] = {name: [] for name in hook_names}
    n_heads: dict[str, int] = {}

    def keep(name: str) -> Callable:
        def hook_fn(activation: Tensor, hook: Any) -> None:
            # HookedTransformer runs ln1 three times, for query, key and value, on the same input; the last one stays.
            fired[name] = flat_activation(name, activation, tokens.shape)[0].float().cpu().numpy()
            if activation.ndim == 4:
                n_heads[name] = activation.shape[2]

        return hook_fn

    for prompt in prompts:
        tokens = torch.tensor([list(prompt)], device=model_device(model))
        fired: dict[str, np.ndarray] = {}
        run_hooked(model, tokens, None, [(name, keep(name)) for name in hook_names])
        for name, rows in fired.items():
            seen[name].append(rows)
    silent = [name for name, parts in seen.items() if len(parts) < len(prompts)]
    if silent:
        remedies = [remedy for name in silent if (remedy := switch_on_hint(model, name))]
        raise InvalidInputError(
            f"{silent} did not fire when the model ran: it has such hook points and does not use them; "
            f"{remedies[0] if remedies else 'leave them out'}"
        )
    return Fingerprint(tuple(map(tuple, prompts)), {name: np.concatenate(parts) for name, parts in seen.items()}, n_heads)


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
    ours = describe_model(model)
    both = f"the bank is of {_named(info)}, the model is {_named(ours)}"
    if ours.tokenizer != info.tokenizer and NO_TOKENIZER not in (ours.tokenizer, info.tokenizer):
        raise ModelMismatchError(
            f"another tokenizer: {both}, and their vocabularies differ (sha256 {info.tokenizer[:8]}… against "
            f"{ours.tokenizer[:8]}…); load the model with its own tokenizer, or rebuild the bank"
        )
    if (ours.d_model, ours.n_layers) != (info.d_model, info.n_layers):
        raise ModelMismatchError(f"another model: {both}; load the model that built the bank, or rebuild the bank")
    if (largest := max(map(max, stored.prompts))) >= ours.d_vocab:
        raise ModelMismatchError(
            f"another model: {both}, and the bank's token {largest} is past its vocabulary of {ours.d_vocab}; load the model "
            "that built the bank, or rebuild the bank"
        )
    known = model.hook_dict
    saes = {name: sae for name in stored.activations if (sae := sae_input_name(name, known))}
    called = {name: saes.get(name) or (name if name in known else bridge_hook_name(name)) for name in stored.activations}
    try:
        found = fingerprint(model, stored.prompts, list(called.values()))
        found = replace(found, activations={name: found.activations[there] for name, there in called.items()})
    except (InvalidInputError, KeyError, ValueError) as error:  # TransformerLens 4 has ValueError for hooks that are off
        raise ModelMismatchError(f"{both}, and the model lacks an activation of the bank: {error}") from error
    for name, rows in stored.activations.items():
        if (width := found.activations[name].shape[-1]) != rows.shape[-1]:
            raise ModelMismatchError(
                f"another model: {both}, and {name} is {rows.shape[-1]} wide in the bank and {width} in the model; load the "
                "model that built the bank, or rebuild the bank"
            )
    overflown = [name for name in stored.activations if not np.array_equal(_finite(stored, name), _finite(found, name))]
    stored, found = _where_finite(stored, found)
    centering = ours.centered != info.centered
    if without_means:
        stored, found = _without_means(stored), _without_means(found)
    names = [
        name
        for name in stored.activations
        if not stored.agrees(found, name, info.dtype)
        or (centering and not without_means and _differ_in_means(stored, found, name))
    ]
    layers = [forward_order(name)[0] for name in known if name.endswith(".hook_sae_input")]
    before: list[str] = []
    changed = layers and not any(".hook_sae_" in name for name in stored.activations)
    if changed:  # an SAE gives something else to all that comes after it
        before = [name for name in stored.activations if name in saes or forward_order(name)[0] < min(layers)]
        if before:
            names, overflown = [n for n in names if n in before], [n for n in overflown if n in before]
    if names or overflown:
        differing = [name for name in stored.activations if name in names or name in overflown]
        cause = (
            f"NaN or inf on one side only, as where a dtype overflows; load the model with dtype={info.dtype}, or read on with "
            "ContextualIndex(bank, allow_mismatch=True)"
        )
        if names:
            cause = _cause(stored, found, names, info, ours)
            if changed and not before:
                cause = f"SAEs are attached from layer {min(layers)} on, which changes them; check without (model.reset_saes())"
        raise ModelMismatchError(
            f"{both}, and their activations differ at {', '.join(differing[:3])}{' …' if differing[3:] else ''}: {cause}"
        )


def _named(info: ModelInfo) -> str:
    centered = ", mean-centred" if info.centered else ""
    return f"{info.name} ({info.class_name}, {info.n_layers} layers, d_model {info.d_model}, {info.dtype}{centered})"


def _cause(stored: Fingerprint, found: Fingerprint, names: Sequence[str], info: ModelInfo, ours: ModelInfo) -> str:
    """Why activations differ, where it can be told, and what to do."""
    bare, bare_found = _without_means(stored), _without_means(found)
    means = [name for name in names if in_residual_stream(name) and bare.agrees(bare_found, name, info.dtype)]
    rest = [name for name in names if name not in means]
    here, there = ("centred", "raw") if ours.centered else ("raw", "centred")
    centering = f"the bank holds {there} activations and the model's weights are {here} (center_writing_weights)"
    if not rest:
        return (
            f"{centering}; load the model as the bank's was loaded, or let both be compared without their means: "
            "ContextualIndex(bank, transform='center_writing')"
        )
    also = f"{centering}, and without their means " if means else ""
    if all(name.endswith(("hook_v", "hook_z")) and _differ_by_a_constant(stored, found, name) for name in rest):
        return (
            f"{also}they differ by the same vector at every token, as value biases do (fold_value_biases); load the model as "
            "the bank's was loaded"
        )
    coarser = max((info.dtype, ours.dtype), key=lambda dtype: TOLERANCES.get(dtype, 0.0))
    noise = 4 * TOLERANCES.get(coarser, 0.0)
    if ours.dtype != info.dtype and all(_distance(stored, found, name) < noise for name in names):
        return (
            f"by about what rounding to {coarser} does; load the model with dtype={info.dtype}, or read on with "
            "ContextualIndex(bank, allow_mismatch=True)"
        )
    residual = [name for name in stored.activations if in_residual_stream(name)]
    if residual and not any(in_residual_stream(name) for name in rest):
        return (
            f"{also}the residual stream is the same, so its weights are processed otherwise (fold_ln, fold_value_biases, "
            "refactor_factored_attn_matrices); load the model as the bank's was loaded"
        )
    weights = "its weights are others"
    if ours.name == info.name:
        weights += " under the same name (a fine-tune, another revision or another checkpoint)"
    return f"{weights}; load the model that built the bank, or rebuild the bank"


def _finite(known: Fingerprint, name: str) -> np.ndarray:
    return np.asarray(np.isfinite(known.activations[name]).all(-1))


def _where_finite(*sides: Fingerprint) -> list[Fingerprint]:
    """The rows of each activation that are finite on all sides."""
    kept = {name: np.logical_and.reduce([_finite(side, name) for side in sides]) for name in sides[0].activations}
    return [replace(side, activations={name: rows[kept[name]] for name, rows in side.activations.items()}) for side in sides]


def _without_means(known: Fingerprint) -> Fingerprint:
    """The activations of the residual stream without their means over d_model."""
    return replace(
        known,
        activations={
            name: rows - rows.mean(-1, keepdims=True) if in_residual_stream(name) else rows
            for name, rows in known.activations.items()
        },
    )


def _differ_in_means(stored: Fingerprint, found: Fingerprint, name: str) -> bool:
    """True where most of the difference is each row's mean, however small it is."""
    apart = found.activations[name] - stored.activations[name]
    return bool(
        in_residual_stream(name) and np.linalg.norm(apart - apart.mean(-1, keepdims=True)) < 0.5 * np.linalg.norm(apart)
    )


def _differ_by_a_constant(stored: Fingerprint, found: Fingerprint, name: str) -> bool:
    apart = found.activations[name] - stored.activations[name]
    return bool(np.linalg.norm(apart - apart.mean(0)) < 1e-2 * np.linalg.norm(apart))


def _distance(stored: Fingerprint, found: Fingerprint, name: str) -> float:
    """The furthest that a row is from where it was, as a share of its length."""
    here, there = stored.activations[name], found.activations[name]
    return float(np.max(np.linalg.norm(there - here, axis=-1) / np.linalg.norm(here, axis=-1), initial=0.0))
