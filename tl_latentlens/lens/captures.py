"""The activations that hooks captured in the last run, and what that run showed of its model and tokens."""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.run_context import RunContext, skipped_positions
from tl_latentlens.model.head_outputs import head_output
from tl_latentlens.model.heads import head_of, head_result_layer
from tl_latentlens.model.key_cache import first_keys, rows_among, same_rows

_MAX_KEY_WIDTH = 64  # so much of a key is enough to tell tokens apart


@dataclass(frozen=True)
class RunTokens:
    """The token ids of a run.

    Attributes:
        ids: [batch, pos].
        is_skipped: True at padding, BOS and other special tokens.
    """

    ids: Int[Tensor, "batch pos"]
    is_skipped: Bool[Tensor, "batch pos"]


@dataclass(frozen=True)
class _Capture:
    activation: Float[Tensor, "batch pos d"]
    context: RunContext


class Captures:
    """The activations of the last run, by hook name in the order in which they fired.

    A new run replaces the last one. Tokens that follow those of the last run through its cache of keys and values, as in
    `generate`, are joined to them.
    """

    def __init__(self, model: Any = None) -> None:
        """Hold nothing yet.

        Args:
            model: The model that will run; None: it is found in the run's context.
        """
        self._given_model = model
        self.clear()

    def __copy__(self) -> "Captures":
        """The same run, held apart: a new run of either does not reach the other."""
        same = Captures()
        same.__dict__.update(vars(self), _in_pass=list(self._in_pass))
        same._of_hook_name = {name: list(held) for name, held in self._of_hook_name.items()}
        return same

    def __bool__(self) -> bool:
        """True where something was captured."""
        return bool(self._of_hook_name)

    @property
    def hook_names(self) -> list[str]:
        """The hook names that fired, in their order."""
        return list(self._of_hook_name)

    @property
    def model(self) -> Any:
        """The given model, or the one that ran; None where neither is known."""
        if self._given_model is None and self:
            return self._first[-1].context.model
        return self._given_model

    @property
    def shape(self) -> tuple[int, int]:
        """Batch and positions of the run, those of its generated tokens included."""
        return len(self._first[0].activation), self._n_tokens(self.hook_names[0])

    @property
    def stopped_early(self) -> bool:
        """True where the run was asked to stop at a layer."""
        return self._first[-1].context.stops_early

    @property
    def _first(self) -> list[_Capture]:
        return next(iter(self._of_hook_name.values()))

    def _n_tokens(self, hook_name: str) -> int:
        return sum(capture.activation.shape[1] for capture in self._of_hook_name[hook_name])

    def add(self, hook_name: str, activation: Float[Tensor, "batch pos d"], context: RunContext) -> None:
        """Hold an activation; the first one of a new run first lets go of the last run.

        A hook that is on the model twice fires twice in one call of its hook point, and is held once.
        """
        is_same_call = self._is_same_call(hook_name, activation, context.source)
        fired_before = hook_name in self._in_pass and not _is_repeated_ln1(hook_name, self._in_pass[-1])
        if not self._in_pass or (fired_before and not is_same_call):
            self._begin_pass(activation, context)
        n_tokens = (context.n_cached or 0) + activation.shape[1]
        if context.cache is not None and (self._keys is None or self._keys.shape[1] < n_tokens):
            keys = first_keys(context.cache, n_tokens)
            self._keys = self._keys if keys is None else _copied(keys)
        held = self._of_hook_name.setdefault(hook_name, [])
        if hook_name in self._in_pass:
            held.pop()
            self._in_pass.remove(hook_name)
        held.append(_Capture(activation, replace(context, cache=None, source=None)))
        self._in_pass.append(hook_name)
        self._source = _reference(context.source)

    def _is_same_call(self, hook_name: str, activation: Float[Tensor, "batch pos d"], source: Tensor | None) -> bool:
        """True where the hook point has not been called again since the last activation; in a graph, where that is the same."""
        if source is not None:
            return self._source is not None and self._source() is source
        last = self._of_hook_name[hook_name][-1].activation if self._in_pass[-1:] == [hook_name] else None
        return last is not None and last.shape == activation.shape and torch.equal(last, activation)

    def _begin_pass(self, activation: Float[Tensor, "batch pos d"], context: RunContext) -> None:
        """Keep the tokens that a forward pass continues, and let go of the others."""
        n_rows, pos = activation.shape[:2]
        n_cached, end = context.n_cached, self._start + (self.shape[1] if self else 0)
        if n_cached is None:  # one more token, of a cache that does not show its length
            n_cached = end if pos == 1 and self else 0
        keys = first_keys(context.cache, n_cached)
        was_cut = self._cache is not None and self._cache() is context.cache  # else the cache is of another text
        if (n_cached == end or was_cut) and self._start < n_cached <= end and self._continues(keys, n_rows, n_cached, end, pos):
            if n_cached < end:
                self._cut(n_cached - self._start)
        else:
            self._of_hook_name, self._start, self.problem = {}, n_cached, None
        if context.search is not None:
            self.problem = f"the model generated by {context.search}, which reorders, repeats or drops rows of the batch"
        self._keys, self._cache, self._in_pass = _copied(keys), _reference(context.cache), []

    def _continues(self, keys: Tensor | None, n_rows: int, n_cached: int, end: int, pos: int) -> bool:
        """True where a pass after so many cached tokens goes on from the captured ones; notes a change of the rows."""
        has_same_rows = n_rows == self.shape[0]
        if keys is None or self._keys is None:
            if not has_same_rows and n_cached == end:
                self.problem = f"the batch changed from {self.shape[0]} to {n_rows} rows while the model generated"
            return n_cached == end and (pos == 1 or keys is not None)
        n_common = min(self._keys.shape[1], keys.shape[1])
        keys, earlier = keys[:, :n_common, :_MAX_KEY_WIDTH], self._keys[:, :n_common]
        if same_rows(keys, earlier):
            return True
        if rows_among(keys, earlier) and n_cached == end:
            self.problem = "rows of the batch were reordered, repeated or dropped while the model generated"
            return True
        return False

    def _cut(self, n_tokens: int) -> None:
        """Keep the first tokens alone, where the cache was cut back to them."""
        for hook_name, held in self._of_hook_name.items():
            kept, left = [], n_tokens
            for capture in held:
                n_own = min(left, capture.activation.shape[1])
                if n_own:
                    kept.append(_first_tokens(capture, n_own))
                left -= n_own
            self._of_hook_name[hook_name] = kept

    def require_whole(self) -> None:
        """Check that each row of the batch is one text, and that every hook name has all its tokens.

        Raises:
            InvalidInputError: A search such as beam search moved rows, or hooks were taken off the model in mid-generation.
        """
        if self.problem is not None:
            raise InvalidInputError(
                f"{self.problem}, so these activations are of no returned text; decode the returned tokens with a run of their "
                "own: model.run_with_hooks(returned, fwd_hooks=hooks)"
            )
        n_tokens = {name: self._n_tokens(name) for name in self.hook_names}
        if short := [name for name, n in n_tokens.items() if n != self.shape[1]]:
            raise InvalidInputError(
                f"{short} fired for other tokens than {self.hook_names[0]}: hooks were added or taken off while the model "
                "generated; run it again with all of them"
            )

    def clear(self) -> None:
        """Hold nothing any more."""
        self._of_hook_name: dict[str, list[_Capture]] = {}
        self.problem: str | None = None
        self._start = 0  # how many tokens of the cache came before the captured ones
        self._keys: Tensor | None = None  # of the tokens in the cache after the last pass, or where it began
        self._in_pass: list[str] = []  # the hook names that fired in the last pass
        self._source: weakref.ref[Any] | None = None  # what entered the hook point that fired last
        self._cache: weakref.ref[Any] | None = None  # the cache of the last pass

    def activation(self, hook_name: str) -> Float[Tensor, "batch pos d"]:
        """The captured activation of a hook name, with those of generated tokens after the prompt's.

        For `attn.hook_result[head]` it is the head's z.
        """
        return torch.cat([capture.activation for capture in self._of_hook_name[hook_name]], 1)

    def vectors(self, hook_name: str, mask: Bool[np.ndarray, "batch pos"]) -> Float[Tensor, "cells d"]:
        """The vectors of a hook name where the mask is True, in reading order; outputs of heads are computed here."""
        activation = self.activation(hook_name)
        vectors = activation[torch.from_numpy(mask).to(activation.device)]
        layer, head = head_result_layer(hook_name), head_of(hook_name)
        return vectors if layer is None or head is None else head_output(self.model, layer, head, vectors)

    def kind_of_vectors(self, hook_name: str) -> tuple[int, torch.dtype, torch.device]:
        """Width, dtype and device of a hook name's captured vectors."""
        activation = self._of_hook_name[hook_name][0].activation
        return activation.shape[-1], activation.dtype, activation.device

    def run_tokens(self, keep_special_tokens: bool = False) -> RunTokens | None:
        """The run's tokens; None where the run did not show them, or its model is not known.

        Args:
            keep_special_tokens: Skip padding and the first BOS alone, as for a bank that was built so.
        """
        contexts = [capture.context for capture in self._first]
        if self.model is None or any(context.tokens is None for context in contexts):
            return None
        ids = torch.cat([context.tokens for context in contexts if context.tokens is not None], 1)
        mask = contexts[0].attention_mask
        if mask is not None:  # the mask of the prompt; generated tokens are no padding
            generated = torch.ones((ids.shape[0], ids.shape[1] - mask.shape[1]), dtype=mask.dtype, device=mask.device)
            mask = torch.cat([mask, generated], 1)
        return RunTokens(ids, skipped_positions(self.model, ids, mask, keep_special_tokens))


def _copied(keys: Float[Tensor, "batch pos d_head"] | None) -> Float[Tensor, "batch pos d"] | None:
    return None if keys is None else keys[..., :_MAX_KEY_WIDTH].clone()


def _reference(thing: Any) -> "weakref.ref[Any] | None":
    """A weak reference; None where there is none, as to a tuple."""
    return None if thing is None or isinstance(thing, tuple | list) else weakref.ref(thing)


def _first_tokens(capture: _Capture, n_tokens: int) -> _Capture:
    """The part of a capture that is of its first tokens."""
    context = capture.context
    tokens, mask = context.tokens, context.attention_mask
    context = replace(
        context,
        tokens=None if tokens is None else tokens[:, :n_tokens],
        attention_mask=None if mask is None else mask[:, :n_tokens],
    )
    return _Capture(capture.activation[:, :n_tokens], context)


def _is_repeated_ln1(hook_name: str, last_hook_name: str) -> bool:
    """True for ln1 of the layer that fired last: HookedTransformer runs it three times, for query, key and value."""
    return ".ln1." in hook_name and hook_name.rpartition(".")[0] == last_hook_name.rpartition(".")[0]
