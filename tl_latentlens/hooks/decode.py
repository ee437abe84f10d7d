"""Hooks that read: capture activations while the model runs, decode them against an index when the result is asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.hooks.names import check_hook_names
from tl_latentlens.hooks.run_context import RunContext, running, skipped_positions
from tl_latentlens.index import ContextualIndex
from tl_latentlens.lenses import embedding_lens, logit_lens
from tl_latentlens.model import flat_activation, in_residual_stream, token_bytes, without_hooks
from tl_latentlens.results import LensResult, TokenReading

_TOGETHER = 4096  # vectors searched at once, of several hook names; more would only take more memory


@dataclass(frozen=True)
class _Capture:
    activation: Float[Tensor, "batch pos d"]
    context: RunContext


class LatentLensHook:
    """A hook function, `fn(activation, hook=hook_point)`, that decodes what it saw when `result` is asked for.

    It never changes the activation, keeps no graph, and returns None. A new run replaces the last one; the tokens that
    `generate` adds one by one are joined to their prompt.
    """

    def __init__(
        self,
        index: ContextualIndex,
        *,
        top_k: int = 5,
        logit_lens: bool = True,
        embedding_lens: bool = False,
        positions: int | Sequence[int] | slice | Bool[Tensor, "batch pos"] | None = None,
        calibrate: bool = False,
        model: Any = None,
    ) -> None:
        """Make a hook; see `latentlens_hooks` for the arguments."""
        if top_k < 1:
            raise InvalidInputError(f"got top_k={top_k}; expected at least 1")
        self.index = index
        self.top_k = top_k
        self.logit_lens = logit_lens
        self.embedding_lens = embedding_lens
        self.positions = [int(positions)] if isinstance(positions, int | np.integer) else positions
        self.calibrate = calibrate
        self.model = model
        self._captured: dict[str, list[_Capture]] = {}
        self._result: LensResult | None = None

    def __call__(self, activation: Tensor, hook: Any, name: str | None = None) -> None:
        """Capture an activation [batch, pos, ...].

        Args:
            activation: What the hook point saw; it is not changed.
            hook: The HookPoint.
            name: The hook name it was asked for under; None: the hook point's own name, which on a bridge may be another.
        """
        name = str(name or hook.name)
        batch, pos = activation.shape[:2]
        vectors = flat_activation(name, activation, (batch, pos)).clone()
        earlier = self._captured.get(name, [])
        context = running(batch, pos)
        goes_on = bool(earlier) and pos == 1 and earlier[-1].activation.shape[0] == batch and context.goes_on
        if name in self._captured and not goes_on and not _again(name, next(reversed(self._captured))):
            self._captured.clear()  # a new run: what it does not reach must not show the last one
        self._captured[name] = [*(earlier if goes_on else []), _Capture(vectors, context)]
        self._result = None

    @property
    def result(self) -> LensResult:
        """What was read from the last run.

        Raises:
            InvalidInputError: No run was captured, or a NaN activation.
            ModelMismatchError: The model that ran is not the bank's.
        """
        if self._result is None:
            model = self.model
            if model is None and self._captured:
                model = next(iter(self._captured.values()))[-1].context.model
            if model is not None:
                with without_hooks(model):  # somebody's hooks may change what a replay gives
                    self.index.check_model(model)
            self._result = self._decode(model)
        return self._result

    def clear(self) -> None:
        """Forget what was captured."""
        self._captured.clear()
        self._result = None

    def _decode(self, model: Any) -> LensResult:
        if not self._captured:
            raise InvalidInputError(
                "nothing was captured: run the model with these hooks first, "
                "model.run_with_hooks(text, fwd_hooks=latentlens_hooks(index))"
            )
        if model is None and (self.logit_lens or self.embedding_lens):
            raise InvalidInputError("the logit lens needs the model: LatentLensHook(index, model=model), or logit_lens=False")
        tokens, skipped = self._input(model)
        captures = next(iter(self._captured.values()))
        decoded = self._chosen((len(captures[0].activation), sum(c.activation.shape[1] for c in captures)), skipped)
        found, logits, embeddings = {}, {}, {}
        for names in self._alike(int(decoded.sum())):
            vectors = torch.stack([self._vectors(name, decoded) for name in names])
            searched = self.index.search(
                vectors, self.top_k, query_hook_name=self._centered_by(names[0]), calibrate=self.calibrate
            )
            for i, name in enumerate(names):
                found[name] = searched[i]
            if model is not None and in_residual_stream(names[0]):
                if self.logit_lens:
                    logits |= _by_name(names, logit_lens(model, vectors, self.top_k))
                if self.embedding_lens:
                    embeddings |= _by_name(names, embedding_lens(model, vectors, self.top_k))
        strings = None
        if tokens is not None:
            texts = token_bytes(model, tokens.unique().tolist())
            strings = [[texts[i].decode("utf-8", errors="replace") for i in row] for row in tokens.tolist()]
        return LensResult(tuple(self._captured), strings, decoded, found, logits, embeddings)

    def _alike(self, cells: int) -> Iterator[list[str]]:
        """Hook names that are searched and read together: a search reads every row, however few the queries."""
        groups: dict[Any, list[str]] = {}
        for name, captures in self._captured.items():
            one = captures[0].activation
            alike = (one.shape[-1], one.dtype, one.device, in_residual_stream(name), self._centered_by(name))
            groups.setdefault(alike, []).append(name)
        at_once = max(1, _TOGETHER // max(1, cells))
        for names in groups.values():
            for first in range(0, len(names), at_once):
                yield names[first : first + at_once]

    def _centered_by(self, name: str) -> str | None:
        """By whose mean and scale the index transforms queries of this name."""
        return name if self.index.moves_queries and name in self.index.hook_names else None

    def _vectors(self, name: str, decoded: Bool[np.ndarray, "batch pos"]) -> Float[Tensor, "cells d"]:
        activation = torch.cat([capture.activation for capture in self._captured[name]], 1)
        return activation[torch.from_numpy(decoded).to(activation.device)]

    def _input(self, model: Any) -> tuple[Tensor | None, Tensor | None]:
        """The run's tokens, and which of them are padding or BOS; None where the run did not show its tokens."""
        contexts = [capture.context for capture in next(iter(self._captured.values()))]
        if model is None or any(context.tokens is None for context in contexts):
            return None, None
        tokens = torch.cat([context.tokens for context in contexts if context.tokens is not None], 1)
        mask = contexts[0].attention_mask
        if mask is not None:
            grown = torch.ones((tokens.shape[0], tokens.shape[1] - mask.shape[1]), dtype=mask.dtype, device=mask.device)
            mask = torch.cat([mask, grown], 1)
        return tokens, skipped_positions(model, tokens, mask)

    def _chosen(self, shape: Sequence[int], skipped: Tensor | None) -> np.ndarray:
        """True at the positions to decode: those the user selected, else all but padding and BOS."""
        batch, pos = shape
        at: Any = self.positions
        if getattr(at, "ndim", 1) == 2:
            return _as_mask(at, (batch, pos))
        if at is None:
            chosen = np.ones((batch, pos), bool)
            return chosen if skipped is None else chosen & ~skipped.cpu().numpy()
        chosen = np.zeros((batch, pos), bool)
        try:
            chosen[:, at if isinstance(at, slice) else list(at)] = True
        except IndexError as error:
            raise InvalidInputError(f"positions={at!r} is outside the run's {pos} positions") from error
        return chosen


def _as_mask(positions: Any, shape: tuple[int, int]) -> Bool[np.ndarray, "batch pos"]:
    mask = torch.as_tensor(positions).cpu().numpy()
    if mask.shape != shape or mask.dtype != bool:
        raise InvalidInputError(f"got positions of shape {mask.shape}, {mask.dtype}; expected bool of [batch, pos], {shape}")
    return mask


def _again(name: str, last: str) -> bool:
    """True for ln1 of the layer that fired last: HookedTransformer runs it three times, for query, key and value."""
    return ".ln1." in name and name.rpartition(".")[0] == last.rpartition(".")[0]


def _by_name(names: Sequence[str], reading: TokenReading) -> dict[str, TokenReading]:
    """A reading of the vectors of several hook names, taken apart."""
    ids, scores = (np.split(part, len(names)) for part in (reading.token_ids, reading.scores))
    return {name: TokenReading(ids[i], scores[i], reading.strings) for i, name in enumerate(names)}


class LensHooks(list[tuple[str, Callable[..., Any]]]):
    """A list of (hook name, function) pairs, the shape that TransformerLens takes, with the `result` of the run."""

    def __init__(self, hook: LatentLensHook, hook_names: Sequence[str]) -> None:
        """Bind each requested name to the hook: on a bridge the hook point's own name differs."""
        super().__init__((name, partial(hook, name=name)) for name in hook_names)
        self.hook = hook

    def __repr__(self) -> str:
        return f"LensHooks({[name for name, _ in self]})"

    @property
    def result(self) -> LensResult:
        """What was read from the last run; see `LatentLensHook.result`."""
        return self.hook.result

    def clear(self) -> None:
        """Forget what was captured."""
        self.hook.clear()


def latentlens_hooks(
    index: ContextualIndex,
    hook_names: str | Sequence[str] | None = None,
    *,
    top_k: int = 5,
    logit_lens: bool = True,
    embedding_lens: bool = False,
    positions: int | Sequence[int] | slice | Bool[Tensor, "batch pos"] | None = None,
    calibrate: bool = False,
    model: Any = None,
) -> LensHooks:
    """Hooks that decode every token of a run by its nearest contextual neighbors, beside the logit lens.

    >>> hooks = latentlens_hooks(index)                              # doctest: +SKIP
    >>> logits = model.run_with_hooks("A boat by the bank.", fwd_hooks=hooks)
    >>> hooks.result.to_dataframe()

    They serve `run_with_hooks`, `with model.hooks(fwd_hooks=hooks): ...` around `run_with_cache` or `generate`, and
    `add_hook`. The model and its tokens are found from the running forward pass.

    Args:
        index: What to decode against; neighbors come from all of its hook names.
        hook_names: Activations to decode; None: those of the index. Another name of the same width works too, given
            `model` so that it can be checked.
        top_k: Neighbors, and logit-lens tokens, for each token.
        logit_lens: Read the model's own unembedding beside the neighbors, for activations in the residual stream's space.
        embedding_lens: Read the nearest input embeddings too, for the same activations.
        positions: Decode only these positions (of the batch's padded tokens; negative ones count from the end), or where a
            mask [batch, pos] is True. None: all but BOS and padding.
        calibrate: Also say of each neighbor how likely a random activation comes as near (`Neighbor.chance`), so that
            readings can be compared across layers, and left aside where chance explains them.
        model: The model, where it should not be looked up: for checking hook names, or for calling the hook by hand.

    Raises:
        UnknownHookError: A hook name that neither the index nor the given model has.
    """
    names = list(index.hook_names) if hook_names is None else [hook_names] if isinstance(hook_names, str) else list(hook_names)
    if model is not None:
        check_hook_names(names, model.hook_dict, type(model).__name__)
    else:
        check_hook_names(names, index.hook_names, "without model=, the index")
    hook = LatentLensHook(
        index,
        top_k=top_k,
        logit_lens=logit_lens,
        embedding_lens=embedding_lens,
        positions=positions,
        calibrate=calibrate,
        model=model,
    )
    return LensHooks(hook, names)
