"""Readings of a model while multiples of a vector are added to its stream; the hooks stand in `steer_hooks`."""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.directions.decode import decode_directions
from tl_latentlens.directions.steering.hooks import AddVector, ComparingHook
from tl_latentlens.directions.steering.prompts import tokenize_prompts
from tl_latentlens.directions.steering.result import SteeringResult
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.lens.lens_hooks import LensHooks
from tl_latentlens.model.activations import pad_prompts
from tl_latentlens.model.describe import model_device, require_model
from tl_latentlens.model.hook_names import check_hook_names
from tl_latentlens.model.hook_points import forward_order, in_residual_stream
from tl_latentlens.model.layers import expand_layers, one_hook_name
from tl_latentlens.model.running import run_hooked
from tl_latentlens.search.tensors import as_tensor

_UNITS = ("vector", "activation")


class SteeringLens:
    """Adds multiples of a vector to a model's stream, and decodes the stream at every later layer.

    >>> steer = SteeringLens(vector, index, "blocks.3.hook_resid_post")             # doctest: +SKIP
    >>> print(steer.run(model, "They walked along the"))
    >>> model.run_with_hooks("They walked along the", fwd_hooks=steer.hooks(2))     # by hand; then steer.result
    """

    def __init__(
        self,
        vector: Float[Tensor, " d"] | np.ndarray,
        index: ContextualIndex,
        hook_name: int | str,
        *,
        multiples: float | Sequence[float] = (0, 1, 2, 4),
        unit: str = "vector",
        positions: int | Sequence[int] | slice | None = None,
        read: int | str | Iterable[int | str] | None = None,
        top_k: int = 5,
        logit_lens: bool = True,
        calibrate: bool = False,
        model: Any = None,
    ) -> None:
        """Choose where a vector is added and where the stream is read.

        Args:
            vector: The vector to add, [d]: a difference of means, an SAE's decoder row, a probe's weight. Where the activation
                has several axes after `pos`, such as heads, they are laid side by side.
            index: The rows to decode against.
            hook_name: The activation that the vector is added to, or a layer in place of its hook_resid_post (3, or -1).
            multiples: The multiples that `run` adds, one run each. Multiple 0 is the unsteered model.
            unit: "vector": multiples of the vector as it is. "activation": the vector is first scaled to the median length of
                the bank's rows at this hook name. Use it for vectors of arbitrary length, such as an SAE's unit rows.
            positions: Positions of the padded batch at which the vector is added; negative ones count from the end. In
                `generate` the count goes on: -1 is each new token in its turn, `slice(5, None)` all from the sixth on.
                None: every position, BOS too.
            read: Hook names, or layers, to read; None: those of the index in the residual stream, from `hook_name` on.
                `hook_name` itself is read after the vector was added.
            top_k: Neighbors, and logit-lens tokens, for each token.
            logit_lens: Read the model's own unembedding beside the neighbors.
            calibrate: Also say how often random directions have neighbors as near as the vector's (`SteeringResult.scores`),
                and calibrate the readings, as `latentlens_hooks(..., calibrate=True)` does.
            model: The model. It is needed where the index does not hold a hook name.

        Raises:
            UnknownHookError: A hook name that neither the index nor the given model has.
            InvalidInputError: A vector of another shape, of NaN, inf or zeros; unit="activation" where the index does not hold
                `hook_name`; nothing to read.
        """
        require_index(index)
        hook_name = one_hook_name(hook_name, index.model_info.n_layers)
        self.read = _hook_names_to_read(hook_name, read, index, model)
        if unit not in _UNITS:
            raise InvalidInputError(f"got unit={unit!r}; expected one of {list(_UNITS)}")
        self.index, self.hook_name, self.positions = index, hook_name, positions
        self.multiples = _finite_multiples(multiples)
        self.vector, self.relative_length = _scaled_vector(vector, unit, index, hook_name)
        self._settings: dict[str, Any] = {"top_k": top_k, "logit_lens": logit_lens, "calibrate": calibrate, "model": model}
        self._readers = {multiple: self._new_reader() for multiple in self.multiples}

    def __repr__(self) -> str:
        multiples = ", ".join(f"{multiple:g}" for multiple in self.multiples)
        return f"SteeringLens({self.hook_name}, multiples {multiples}, reads {list(self.read)})"

    def __getstate__(self) -> dict[str, Any]:
        """The vector and the settings; model and runs stay in their process."""
        return {**vars(self), "_settings": {**self._settings, "model": None}, "_readers": {}}

    def _new_reader(self) -> ComparingHook:
        return ComparingHook(self.index, **self._settings)

    def hooks(self, multiple: float) -> LensHooks:
        """Hooks in TransformerLens' shape: the first adds the multiple of the vector, the others read (`.result`).

        The first hook returns a new tensor of the activation's dtype. Multiple 0 adds no such hook, so the logits stay
        bit-identical.
        """
        multiple = _finite_multiple(multiple)
        hooks = LensHooks(self._readers.setdefault(multiple, self._new_reader()), self.read)
        if multiple:
            hooks.insert(0, (self.hook_name, AddVector(multiple * self.vector, self.hook_name, self.positions)))
        return hooks

    def run(self, model: Any, text: str | Sequence[str] | Int[Tensor, "batch pos"]) -> SteeringResult:
        """The readings of text (or of tokens without padding), run once for each of `multiples`.

        Earlier runs are forgotten. No logits are computed.

        Raises:
            UnknownHookError: A hook name that the model does not have.
            ModelMismatchError: The model is not the bank's.
            InvalidInputError: A text without tokens.
        """
        require_model(model)
        check_hook_names([self.hook_name, *self.read], model.hook_dict, type(model).__name__)
        self.index.check_model(model)
        device = model_device(model)
        if isinstance(text, Tensor):
            tokens, mask = text.to(device), None
        else:
            tokens, mask = pad_prompts(tokenize_prompts(model, text, "given").as_lists(), device)
        self.clear()
        for multiple in self.multiples:
            run_hooked(model, tokens, mask, self.hooks(multiple))
        return self.result

    @property
    def result(self) -> SteeringResult:
        """The readings so far: the last run of each multiple.

        Raises:
            InvalidInputError: Nothing was run, or a NaN activation.
            ModelMismatchError: The model that ran is not the bank's.
        """
        readers = {multiple: reader for multiple, reader in sorted(self._readers.items()) if reader.has_run}
        if not readers:
            raise InvalidInputError(
                "nothing was read: call steer.run(model, text), or run the model with steer.hooks(multiple)"
            )
        unsteered = readers.get(0.0)
        return SteeringResult(
            self.hook_name,
            self.relative_length,
            {multiple: reader.result for multiple, reader in readers.items()},
            {} if unsteered is None else {multiple: reader.cosines(unsteered) for multiple, reader in readers.items()},
            self._scores if self._settings["calibrate"] else None,
        )

    @cached_property
    def _scores(self) -> pd.DataFrame | None:
        """The vector's nearness to the rows of its own hook name, or else of those that are read; None where there are none."""
        hook_names = [self.hook_name, *self.read]
        held = [name for name in hook_names if name in self.index.hook_names and self.index.d(name) == len(self.vector)]
        if not held:
            return None
        searched = held[:1] if held[0] == self.hook_name else held
        top_k = self._settings["top_k"]
        return decode_directions(self.vector, self.index, top_k=top_k, hook_name=searched, calibrate=True).scores

    def clear(self) -> None:
        """Forget all readings."""
        for reader in self._readers.values():
            reader.clear()


def _hook_names_to_read(
    hook_name: str, read: int | str | Iterable[int | str] | None, index: ContextualIndex, model: Any
) -> tuple[str, ...]:
    """The requested hook names, or those of the index in the residual stream from `hook_name` on, in forward order."""
    if model is None:
        available, owner = index.hook_names, "without model=, the index"
    else:
        available, owner = model.hook_dict, type(model).__name__
    check_hook_names([hook_name], available, owner)
    if read is None:
        later = [n for n in index.hook_names if in_residual_stream(n) and forward_order(n) >= forward_order(hook_name)]
        hook_names = sorted(later, key=forward_order)
    else:
        hook_names = expand_layers(read, index.model_info.n_layers)
    check_hook_names(hook_names, available, owner)
    if not hook_names:
        raise InvalidInputError(f"the index holds nothing of the residual stream from {hook_name} on; say what to read: read=")
    return tuple(hook_names)


def _finite_multiples(multiples: float | Sequence[float]) -> tuple[float, ...]:
    if isinstance(multiples, int | float):
        return (_finite_multiple(multiples),)
    if not (checked := tuple(map(_finite_multiple, multiples))):
        raise InvalidInputError("got no multiples; expected at least one, for instance (0, 1, 2, 4)")
    return checked


def _finite_multiple(multiple: float) -> float:
    if isinstance(multiple, str) or not math.isfinite(multiple):
        raise InvalidInputError(f"got a multiple of {multiple}; expected finite numbers")
    return float(multiple)


def _scaled_vector(
    vector: Tensor | np.ndarray, unit: str, index: ContextualIndex, hook_name: str
) -> tuple[Float[Tensor, " d"], float | None]:
    """The vector to add, and its length as a share of the median row's; None where the index lacks the hook name."""
    is_indexed = hook_name in index.hook_names
    tensor = _finite_vector(vector, index.d(hook_name) if is_indexed else None)
    median_length = _median_row_length(index, hook_name) if is_indexed else None
    if unit == "activation":
        if median_length is None:
            raise InvalidInputError(f"unit='activation' needs the lengths of {hook_name}, which the index does not hold")
        tensor = tensor * (median_length / tensor.norm())
    return tensor, None if median_length is None else float(tensor.norm()) / median_length


def _finite_vector(vector: Tensor | np.ndarray, width: int | None) -> Float[Tensor, " d"]:
    tensor = as_tensor(vector).float()
    if tensor.ndim != 1 or (width is not None and len(tensor) != width):
        raise InvalidInputError(f"got a steering vector of shape {tuple(tensor.shape)}; expected ({width or 'd'},)")
    if not bool(torch.isfinite(tensor).all()) or not bool(tensor.any()):
        raise InvalidInputError("the steering vector holds NaN or inf, or is all zeros; look at what it was made from")
    return tensor


def _median_row_length(index: ContextualIndex, hook_name: str) -> float:
    return float(np.median(np.concatenate([bank.norms(hook_name) for _, bank in index.bank_rows.of(hook_name)])))
