"""Steering: a vector from two sets of prompts, and what the stream means after multiples of a vector were added to it.

What a vector by itself is near to is read by `directions.decode_directions`.
"""

import html
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from rich.console import Group
from torch import Tensor

from tl_latentlens.corpus.plan import Prompts
from tl_latentlens.directions.steer_hooks import AddVector, ComparingHook
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.lens.hook import LensHooks
from tl_latentlens.lens.result import LensResult
from tl_latentlens.model.activations import activations_at, batches, padded
from tl_latentlens.model.adapter import flat_activation, in_residual_stream, model_device, require_model, run_hooked, tokenize
from tl_latentlens.model.heads import fires_as
from tl_latentlens.model.hook_names import check_hook_names, forward_order, require_firing
from tl_latentlens.search.vectors import as_tensor

_UNITS = ("vector", "activation")


def difference_of_means(
    model: Any, positive: str | Sequence[str], negative: str | Sequence[str], hook_name: str, *, positions: int | None = -1
) -> Float[Tensor, " d"]:
    """A steering vector: the mean activation over the positive prompts minus that over the negative ones.

    The prompts are run in batches, without gradients, and no layer after the hook name is run.

    Args:
        model: A TransformerLens model with a tokenizer.
        positive: Prompts that the vector points to.
        negative: Prompts that it points away from.
        hook_name: The activation; several axes after `pos`, such as heads, are laid side by side, and `hook_z[1]` is one head.
        positions: -1: the last token of each prompt, whatever the padding; -2: the one before, and so on. None: the mean over
            each prompt's tokens but BOS; every prompt counts the same, however long.

    Returns:
        The vector in float32, on the model's device, as long as the means are apart.

    Raises:
        UnknownHookError: A hook name that the model does not have.
        InvalidInputError: No prompts, a prompt without (enough) tokens, or an activation that does not fire.
    """
    require_model(model)
    require_firing([hook_name], model)
    if positions is not None and positions >= 0:
        raise InvalidInputError(f"got positions={positions}; expected -1 (each prompt's last token), -2, ..., or None for all")
    sides = [
        _prompts(model, texts, side, -(positions or -1)) for side, texts in (("positive", positive), ("negative", negative))
    ]
    up, down = (_mean(model, prompts, hook_name, positions) for prompts in sides)
    return (up - down).float().to(model_device(model))


def _prompts(model: Any, texts: str | Sequence[str], side: str, least: int = 1) -> Prompts:
    """The tokens of texts, each of which must have some."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise InvalidInputError(f"got no {side} prompts; expected at least one text")
    if not all(isinstance(text, str) for text in texts):
        raise InvalidInputError(f"got {side} prompts {str(texts)[:60]}; expected texts, each a str")
    prompts = tokenize(model, texts)
    lengths = np.diff(np.r_[0, np.cumsum(~prompts.special)][prompts.starts])
    if (lengths < least).any():
        short = int(np.argmax(lengths < least))
        raise InvalidInputError(
            f"{side} prompt {short}, {texts[short]!r}, has {lengths[short]} tokens besides BOS; expected at least {least}"
        )
    if prompts.n_truncated:
        cut = f"{prompts.n_truncated} {side} prompts were longer than n_ctx = {model.cfg.n_ctx} tokens and were cut"
        warnings.warn(cut, stacklevel=4)
    return prompts


def _mean(model: Any, prompts: Prompts, hook_name: str, positions: int | None) -> Float[Tensor, " d"]:
    """The mean over the prompts, float64."""
    tokens = prompts.as_lists()
    if positions is not None:
        at = np.diff(prompts.starts) + positions
        return activations_at(model, tokens, at, [hook_name])[hook_name].double().mean(0)
    before = np.add.reduceat(prompts.special, prompts.starts[:-1])  # BOS
    total: list[Tensor] = []
    for chosen, ids, mask in batches(tokens, model_device(model)):
        text = mask & (torch.arange(mask.shape[1]) >= torch.from_numpy(before[chosen])[:, None]).to(mask.device)
        total.append(_sum_of_means(model, ids, mask, text, hook_name))
    return torch.stack(total).sum(0) / len(tokens)


def _sum_of_means(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    text: Bool[Tensor, "batch pos"],
    hook_name: str,
) -> Float[Tensor, " d"]:
    weights = text / text.sum(-1, keepdim=True)
    seen: list[Tensor] = []

    def gather(activation: Tensor, hook: Any) -> None:
        flat = flat_activation(hook_name, activation, weights.shape).float()
        seen.append(einsum(flat, weights.to(flat.device), "batch pos d, batch pos -> d"))

    run_hooked(model, tokens, mask, [(fires_as(hook_name), gather)])
    return seen[-1].cpu().double()  # HookedTransformer runs ln1 three times, for query, key and value


class SteeringLens:
    """Adds multiples of a vector to a model's stream and reads, at every later layer, what the stream is then near to.

    >>> steer = SteeringLens(vector, index, "blocks.3.hook_resid_post")             # doctest: +SKIP
    >>> print(steer.run(model, "They walked along the"))
    >>> model.run_with_hooks("They walked along the", fwd_hooks=steer.hooks(2))     # by hand; then steer.result
    """

    def __init__(
        self,
        vector: Float[Tensor, " d"] | np.ndarray,
        index: ContextualIndex,
        hook_name: str,
        *,
        multiples: float | Sequence[float] = (0, 1, 2, 4),
        unit: str = "vector",
        positions: int | Sequence[int] | slice | None = None,
        read: str | Sequence[str] | None = None,
        top_k: int = 5,
        logit_lens: bool = True,
        model: Any = None,
    ) -> None:
        """Choose where a vector is added and where the stream is read.

        Args:
            vector: What is added, [d]: a difference of means, an SAE's decoder row, a probe's weight. Where the activation has
                several axes after `pos`, such as heads, they are laid side by side.
            index: What to decode against.
            hook_name: The activation that the vector is added to.
            multiples: Which multiples `run` adds, one run each; 0 is the model as it is.
            unit: "vector": multiples of the vector as it is. "activation": the vector is first made as long as the median row
                of the bank at this hook name, for vectors whose length says nothing, such as an SAE's rows of length 1.
            positions: Add at these positions only (of the batch's padded tokens; negative ones count from the end). In
                `generate` new tokens are counted on: -1 is then each token in its turn, `slice(5, None)` all from the sixth on.
                None: at every position, BOS too, as a hook that returns `activation + vector` does.
            read: Hook names to read; None: those of the index in the residual stream, from `hook_name` on. `hook_name` itself
                is read after the vector was added.
            top_k: Neighbors, and logit-lens tokens, for each token.
            logit_lens: Read the model's own unembedding beside the neighbors.
            model: The model, needed where the index does not hold a hook name.

        Raises:
            UnknownHookError: A hook name that neither the index nor the given model has.
            InvalidInputError: A vector of another shape, of NaN, inf or zeros; unit="activation" where the index does not hold
                `hook_name`; nothing to read.
        """
        require_index(index)
        known, where = (
            (index.hook_names, "without model=, the index") if model is None else (model.hook_dict, type(model).__name__)
        )
        check_hook_names([hook_name], known, where)
        names = [read] if isinstance(read, str) else _later(hook_name, index) if read is None else list(read)
        check_hook_names(names, known, where)
        if not names:
            raise InvalidInputError(
                f"the index holds nothing of the residual stream from {hook_name} on; say what to read: read="
            )
        if unit not in _UNITS:
            raise InvalidInputError(f"got unit={unit!r}; expected one of {list(_UNITS)}")
        self.index, self.hook_name, self.read, self.positions = index, hook_name, tuple(names), positions
        self.multiples = tuple(map(_finite, [multiples] if isinstance(multiples, int | float) else multiples))
        if not self.multiples:
            raise InvalidInputError("got no multiples; expected at least one, for instance (0, 1, 2, 4)")
        self.vector = _checked(vector, index.d(hook_name) if hook_name in index.hook_names else None)
        typical = _typical_length(index, hook_name)
        if unit == "activation":
            if typical is None:
                raise InvalidInputError(f"unit='activation' needs the lengths of {hook_name}, which the index does not hold")
            self.vector = self.vector * (typical / self.vector.norm())
        self.relative_length = None if typical is None else float(self.vector.norm()) / typical
        self._settings: dict[str, Any] = {"top_k": top_k, "logit_lens": logit_lens, "model": model}
        self._readers = {multiple: self._reader() for multiple in self.multiples}

    def __repr__(self) -> str:
        multiples = ", ".join(f"{multiple:g}" for multiple in self.multiples)
        return f"SteeringLens({self.hook_name}, multiples {multiples}, reads {list(self.read)})"

    def _reader(self) -> ComparingHook:
        return ComparingHook(self.index, **self._settings)

    def hooks(self, multiple: float) -> LensHooks:
        """Hooks in TransformerLens' shape: the first adds the multiple of the vector, the others read (`.result`).

        They change the run, as is their purpose: not in place, and in the activation's own dtype. Multiple 0 adds nothing, so
        that logits stay bit-identical.
        """
        multiple = _finite(multiple)
        hooks = LensHooks(self._readers.setdefault(multiple, self._reader()), self.read)
        if multiple:
            hooks.insert(0, (self.hook_name, AddVector(multiple * self.vector, self.hook_name, self.positions)))
        return hooks

    def run(self, model: Any, text: str | Sequence[str] | Int[Tensor, "batch pos"]) -> "SteeringResult":
        """Run text (or tokens without padding) once for each of `multiples`; forgets earlier runs and computes no logits.

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
            tokens, mask = padded(_prompts(model, text, "given").as_lists(), device)
        self.clear()
        for multiple in self.multiples:
            run_hooked(model, tokens, mask, self.hooks(multiple))
        return self.result

    @property
    def result(self) -> "SteeringResult":
        """What was read under each multiple so far, in the last run of each.

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
        )

    def clear(self) -> None:
        """Forget what was read."""
        for reader in self._readers.values():
            reader.clear()


@dataclass(frozen=True)
class SteeringResult:
    """What was read under each multiple of a steering vector.

    Attributes:
        hook_name: Where the vector was added.
        relative_length: Length of the vector (at multiple 1) as a share of the median length of the bank's rows at `hook_name`;
            None where the index does not hold it.
        readings: Multiple → what the lens hooks read.
        cosines: Multiple → hook name → cosine in [-1, 1] of each decoded token's activation with the unsteered one, in reading
            order; NaN where the tokens up to there are not the same. Empty where multiple 0 was not run.
    """

    hook_name: str
    relative_length: float | None
    readings: dict[float, LensResult] = field(repr=False)
    cosines: dict[float, dict[str, Float[np.ndarray, " cells"]]] = field(repr=False)

    def __str__(self) -> str:
        from tl_latentlens.views.terminal import as_plain

        return as_plain(self.table(width=80), 80)

    def _repr_html_(self) -> str:
        return f"<pre style='line-height: 1.2'>{html.escape(str(self))}</pre>"

    def table(self, pos: int | None = None, batch: int | None = None, *, width: int | None = None) -> Group:
        """Tables for the terminal (`rich.print`): a line a layer, the multiples side by side.

        Args:
            pos: Which token; negative ones count from the end. None: the last that was decoded.
            batch: Which text; None: each.
            width: In characters; None: the terminal's.

        Raises:
            InvalidInputError: The position was not decoded.
        """
        from tl_latentlens.views.steering import steering_table

        return steering_table(self, pos, batch, width)

    def to_dataframe(self) -> pd.DataFrame:
        """The lines of `LensResult.to_dataframe` with `multiple` in front, and `cos_to_unsteered` (of the cell) behind."""
        frames = []
        for multiple, reading in self.readings.items():
            frame = reading.to_dataframe()
            frame.insert(0, "multiple", multiple)
            places = zip(frame["hook_name"], frame["batch"], frame["pos"], strict=True)
            cosines = self.cosines_at(multiple)
            frame["cos_to_unsteered"] = [cosines.get(place, np.nan) for place in places]
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def cosines_at(self, multiple: float) -> dict[tuple[str, int, int], float]:
        """(hook name, batch, pos) → cosine with the unsteered activation."""
        places = self.readings[multiple].positions.tolist()
        found = self.cosines.get(multiple, {})
        return {(name, *place): cos for name in found for place, cos in zip(places, found[name].tolist(), strict=True)}


def _later(hook_name: str, index: ContextualIndex) -> list[str]:
    """The hook names of an index in the residual stream from one on, in forward order."""
    names = [name for name in index.hook_names if in_residual_stream(name)]
    return sorted((name for name in names if forward_order(name) >= forward_order(hook_name)), key=forward_order)


def _finite(multiple: float) -> float:
    if isinstance(multiple, str) or not math.isfinite(multiple):
        raise InvalidInputError(f"got a multiple of {multiple}; expected finite numbers")
    return float(multiple)


def _checked(vector: Tensor | np.ndarray, width: int | None) -> Float[Tensor, " d"]:
    tensor = as_tensor(vector).float()
    if tensor.ndim != 1 or (width is not None and len(tensor) != width):
        raise InvalidInputError(f"got a steering vector of shape {tuple(tensor.shape)}; expected ({width or 'd'},)")
    if not bool(torch.isfinite(tensor).all()) or not bool(tensor.any()):
        raise InvalidInputError("the steering vector holds NaN or inf, or is all zeros; look at what it was made from")
    return tensor


def _typical_length(index: ContextualIndex, hook_name: str) -> float | None:
    """Median length of the rows at a hook name."""
    if hook_name not in index.hook_names:
        return None
    return float(np.median(np.concatenate([bank.norms(hook_name) for _, bank in index.banks_of(hook_name)])))
