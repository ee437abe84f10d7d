"""The activations that a model gives for a few prompts: enough to know the model again.

`fingerprint_check` compares them with those of another model.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.describe import model_device
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.model.hook_points import in_residual_stream, switch_on_hint
from tl_latentlens.model.running import run_hooked

TOLERANCES = {"float32": 5e-3, "float16": 2e-2, "bfloat16": 5e-2}
"""Dtype of the weights → by how much activations of one model may differ between two runs, as a share of their length."""
_DEFAULT_TOLERANCE = 5e-3
_is_replaying = ContextVar("is_replaying", default=False)


@dataclass(frozen=True)
class Fingerprint:
    """The activations that a model gave for a few prompts.

    Attributes:
        prompts: Token ids of each prompt, BOS included.
        activations: Hook name → float32 [n_tokens, d], the prompts back to back, heads side by side.
        n_heads: Hook name → number of heads, for activations that have heads.
    """

    prompts: tuple[tuple[int, ...], ...]
    activations: dict[str, Float[np.ndarray, "tokens d"]]
    n_heads: dict[str, int] = field(default_factory=dict)

    def agrees(self, other: "Fingerprint", hook_name: str, dtype: str) -> bool:
        """True where another model's activations are these, up to the noise between devices and batch sizes.

        Rows are compared one by one, so that a massive activation, as at BOS, does not hide the others. Rows that are not
        finite on both sides (float16 models overflow at BOS) count as equal.

        Args:
            other: The activations of the other model for the same prompts.
            hook_name: The activation to compare.
            dtype: The dtype of the weights which gave `self`; it sets the tolerance.
        """
        own_rows, other_rows = self.activations[hook_name], other.activations[hook_name]
        if own_rows.shape != other_rows.shape:
            return False
        tolerance = TOLERANCES.get(dtype, _DEFAULT_TOLERANCE)
        with np.errstate(invalid="ignore", over="ignore"):
            near = np.linalg.norm(other_rows - own_rows, axis=-1) <= tolerance * np.linalg.norm(own_rows, axis=-1)
        return bool(np.where(self.finite_rows(hook_name), near, ~other.finite_rows(hook_name)).all())

    def finite_rows(self, hook_name: str) -> Bool[np.ndarray, " tokens"]:
        """True for the tokens whose activation holds no NaN and no inf."""
        return np.asarray(np.isfinite(self.activations[hook_name]).all(-1))

    def without_means(self) -> "Fingerprint":
        """The same, with the mean over d_model taken away from each vector of the residual stream."""
        centered = {
            name: rows - rows.mean(-1, keepdims=True) if in_residual_stream(name) else rows
            for name, rows in self.activations.items()
        }
        return replace(self, activations=centered)


def is_replaying() -> bool:
    """True in a run for a fingerprint, which is no run of the user's."""
    return _is_replaying.get()


def fingerprint(model: Any, prompts: Sequence[Sequence[int]], hook_names: Sequence[str]) -> Fingerprint:
    """The activations that the model gives for each prompt alone, in float32.

    Raises:
        InvalidInputError: A hook name that never fires, or whose activation is not [batch, pos, ...].
    """
    rows_of_prompts: dict[str, list[np.ndarray]] = {name: [] for name in hook_names}
    n_heads: dict[str, int] = {}

    def keep(name: str) -> Callable:
        def hook_fn(activation: Tensor, hook: Any) -> None:
            # HookedTransformer runs ln1 three times on one input, for query, key and value. The last run is kept.
            fired[name] = flat_activation(name, activation, tokens.shape)[0].float().cpu().numpy()
            if activation.ndim == 4:
                n_heads[name] = activation.shape[2]

        return hook_fn

    replaying = _is_replaying.set(True)
    try:
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)], device=model_device(model))
            fired: dict[str, np.ndarray] = {}
            run_hooked(model, tokens, None, [(name, keep(name)) for name in hook_names])
            for name, rows in fired.items():
                rows_of_prompts[name].append(rows)
    finally:
        _is_replaying.reset(replaying)
    silent = [name for name, rows in rows_of_prompts.items() if len(rows) < len(prompts)]
    if silent:
        hints = [hint for name in silent if (hint := switch_on_hint(model, name))]
        raise InvalidInputError(
            f"{silent} did not fire when the model ran: it has such hook points and does not use them; "
            f"{hints[0] if hints else 'leave them out'}"
        )
    activations = {name: np.concatenate(rows) for name, rows in rows_of_prompts.items()}
    return Fingerprint(tuple(map(tuple, prompts)), activations, n_heads)
