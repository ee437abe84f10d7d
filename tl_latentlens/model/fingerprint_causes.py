"""Why a model does not give the activations of a bank, where that can be told, and what to do about it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tl_latentlens.model.describe import model_device
from tl_latentlens.model.fingerprint import TOLERANCES, Fingerprint
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.state import named_parts
from tl_latentlens.search.ambient import autocast_as, autocast_state, full_products_only, has_full_products

_READ_ON = "or read on with ContextualIndex(bank, allow_mismatch=True)"
_SAME_RUN_SHARE = 0.1  # Under the settings of the bank's own run, less than this share of the difference is left.
_MATRIX_SIDE = 8  # Whole numbers in a matrix with shorter sides than this are no weights.


@dataclass(frozen=True)
class Models:
    """The two models that are compared; its text names both.

    Attributes:
        bank: The model of the bank.
        model: The model that is checked.
        hooked: Where hooks were attached to the bank's model when it was built.
        attached: Where hooks are attached to the model that is checked.
    """

    bank: ModelInfo
    model: ModelInfo
    hooked: Sequence[str] = ()
    attached: Sequence[str] = ()

    def __str__(self) -> str:
        return f"the bank is of {_named(self.bank)}, the model is {_named(self.model)}"


def _named(info: ModelInfo) -> str:
    centered = ", mean-centred" if info.centered else ""
    stored = f" of {info.quantization} in a GGUF file" * bool(info.quantization)
    return f"{info.name} ({info.class_name}, {info.n_layers} layers, d_model {info.d_model}, {info.dtype}{stored}{centered})"


def cause_in_settings(model: Any, distance_now: float, measure_distance: Callable[[], float]) -> str | None:
    """The setting of torch that keeps the model from giving the activations, and what to do; None: no such setting.

    Args:
        model: The model.
        distance_now: The largest difference of its activations from the bank's, as a share of their length.
        measure_distance: Runs the model again, and gives that difference then.
    """
    for settings, cause in _other_settings(model):
        try:
            with settings:
                distance = measure_distance()
        except RuntimeError:  # an operator that the device does not have in that dtype
            continue
        if distance < _SAME_RUN_SHARE * distance_now:
            return cause
    return None


def _other_settings(model: Any) -> Iterator[tuple[AbstractContextManager[Any], str]]:
    """Settings that do not hold now, each with what it would mean if the activations agreed under it."""
    if state := autocast_state():
        dtypes = " and ".join(f"{device}, {str(dtype).removeprefix('torch.')}" for device, dtype in state)
        yield (
            autocast_as(()),
            f"torch.autocast was on ({dtypes}) when the model ran, and it agrees without; run it without autocast, {_READ_ON}",
        )
    if not has_full_products():
        yield (
            full_products_only(),
            "float32 products were of reduced precision when the model ran (TF32 or bfloat16), and it agrees without; call "
            f"torch.set_float32_matmul_precision('highest') before it runs, {_READ_ON}",
        )
    device = model_device(model).type
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        if (device, dtype) not in state:
            yield (
                autocast_as(((device, dtype),)),
                f"the bank was built under torch.autocast({device!r}, {name}), where the model agrees; run it so, {_READ_ON}",
            )


def cause(model: Any, stored: Fingerprint, replayed: Fingerprint, names: Sequence[str], models: Models) -> str:
    """Why activations differ, where it can be told of the two models, and what to do.

    Args:
        model: The model that is checked.
        stored: The activations of the bank, where both are finite.
        replayed: Those of the model.
        names: The hook names at which they differ.
        models: Both models.
    """
    bank, checked = models.bank, models.model
    centered, replayed_centered = stored.without_means(), replayed.without_means()
    may_be_centered = bank.centered != checked.centered
    only_means = [
        name
        for name in names
        if may_be_centered and in_residual_stream(name) and centered.agrees(replayed_centered, name, bank.dtype)
    ]
    unexplained = [name for name in names if name not in only_means]
    of_model, of_bank = ("centred", "raw") if checked.centered else ("raw", "centred")
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
    coarser = max((bank.dtype, checked.dtype), key=lambda dtype: TOLERANCES.get(dtype, 0.0))
    moved = _movement(stored, replayed, names)
    if checked.dtype != bank.dtype and moved.difference < 4 * TOLERANCES.get(coarser, 0.0):
        return (
            f"their dtypes differ ({bank.dtype} against {checked.dtype}), and activations moved to a {moved}, by about what "
            f"rounding to {coarser} does; load the model with dtype={bank.dtype}, {_READ_ON}"
        )
    residual = [name for name in stored.activations if in_residual_stream(name)]
    if residual and not any(in_residual_stream(name) for name in unexplained):
        return (
            f"{also}the residual stream is the same, so its weights are processed otherwise (fold_ln, fold_value_biases, "
            "refactor_factored_attn_matrices); load the model as the bank's was loaded"
        )
    if models.hooked:
        return (
            f"the bank was built while hooks were attached at {some(models.hooked)}, which may have changed its activations; "
            f"attach them (model.add_hook), rebuild the bank without them, {_READ_ON}"
        )
    if bank.quantization != checked.quantization:
        read = [
            f"read from GGUF types {types}" if types else "read from no GGUF file"
            for types in (bank.quantization, checked.quantization)
        ]
        return (
            f"their weights were stored otherwise: the bank's model was {read[0]}, this one {read[1]}, with a {moved}; load "
            f"the model that built the bank, {_READ_ON}"
        )
    if quantized := _quantized_weights(model):
        return f"the model's weights are quantized ({quantized}), with a {moved}; load it without, {_READ_ON}"
    weights = "its weights are others"
    if checked.name == bank.name:
        weights += " under the same name (a fine-tune, another revision or another checkpoint)"
    if checked.dtype != bank.dtype:
        weights += f", beside its dtype: activations moved to a {moved}, further than rounding to {coarser} does"
    if models.attached:
        weights += f", with the hooks that are attached at {some(models.attached)} as without them"
    return f"{weights}; load the model that built the bank, or rebuild the bank"


def differ_mostly_in_means(stored: Fingerprint, replayed: Fingerprint, name: str) -> bool:
    """True where most of the difference is each vector's mean over d_model, however small the difference is."""
    difference = replayed.activations[name] - stored.activations[name]
    rest = difference - difference.mean(-1, keepdims=True)
    return bool(in_residual_stream(name) and np.linalg.norm(rest) < 0.5 * np.linalg.norm(difference))


def _differ_by_a_constant(stored: Fingerprint, replayed: Fingerprint, name: str) -> bool:
    """True where the difference is the same vector at every token."""
    difference = replayed.activations[name] - stored.activations[name]
    return bool(np.linalg.norm(difference - difference.mean(0)) < 1e-2 * np.linalg.norm(difference))


def largest_difference(stored: Fingerprint, replayed: Fingerprint) -> float:
    """The largest difference of a vector from the stored one, as a share of the stored one's length."""
    pairs = ((rows, replayed.activations[name]) for name, rows in stored.activations.items())
    shares = [np.linalg.norm(other - rows, axis=-1) / np.maximum(np.linalg.norm(rows, axis=-1), 1e-30) for rows, other in pairs]
    return float(max(np.max(share, initial=0.0) for share in shares))


@dataclass(frozen=True)
class _Movement:
    """How far activations moved.

    Attributes:
        difference: The median difference from the stored vectors, as a share of their length, where it is largest.
        cosine: The median cosine there.
        lowest: The lowest cosine anywhere.
    """

    difference: float
    cosine: float
    lowest: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f} in the median and {self.lowest:.4f} at the least"


def _movement(stored: Fingerprint, replayed: Fingerprint, names: Sequence[str]) -> _Movement:
    """How far activations moved; the median, since rounding moves a few tokens of large models further than all others."""
    differences, cosines = [], []
    for name in names:
        rows, replayed_rows = (side.activations[name].astype(np.float64) for side in (stored, replayed))
        lengths, replayed_lengths = (np.linalg.norm(side, axis=-1) for side in (rows, replayed_rows))
        with np.errstate(invalid="ignore", divide="ignore"):
            differences.append(np.nan_to_num(np.linalg.norm(replayed_rows - rows, axis=-1) / lengths, nan=0.0, posinf=1.0))
            cosines.append(np.nan_to_num((rows * replayed_rows).sum(-1) / (lengths * replayed_lengths), nan=1.0))
    medians = [float(np.median(difference)) if len(difference) else 0.0 for difference in differences]
    place = int(np.argmax(medians))
    return _Movement(medians[place], float(np.median(cosines[place])), float(np.min(np.concatenate(cosines))))


def _quantized_weights(model: Any) -> str:
    """The dtypes of whole numbers in which a model holds matrices of weights; empty where it holds none."""
    tensors = [tensor for _, part in named_parts(model) for tensor in (*part.parameters(False), *part.buffers(False))]
    whole = [t for t in tensors if t.ndim == 2 and min(t.shape) >= _MATRIX_SIDE and not t.is_floating_point()]
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in whole if t.dtype != torch.bool}))


def some(names: Sequence[str]) -> str:
    """The first names of many."""
    return f"{', '.join(names[:3])}{' …' if names[3:] else ''}"
