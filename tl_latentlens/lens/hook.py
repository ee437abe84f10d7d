"""Hooks that read: capture activations while the model runs, decode them against an index when the result is asked for."""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.lens.followed import FollowedTokens, TokenRanks, neighbor_ranks
from tl_latentlens.lens.lenses import embedding_lens, embedding_ranks, logit_lens, logit_ranks
from tl_latentlens.lens.result import LensResult, TokenReading
from tl_latentlens.lens.run_context import RunContext, running, skipped_positions
from tl_latentlens.model.flatten import activations_by_name
from tl_latentlens.model.head_outputs import head_output
from tl_latentlens.model.heads import (
    head_of,
    head_result_layer,
    hook_point,
    is_all_heads_name,
    is_head_name,
    tl_hook_name,
)
from tl_latentlens.model.hook_names import check_hook_names, require_firing, require_language_model
from tl_latentlens.model.hook_points import forward_order, in_residual_stream
from tl_latentlens.model.image_tokens import image_positions
from tl_latentlens.model.running import without_hooks
from tl_latentlens.model.token_strings import single_tokens, token_bytes

_Read = TypeVar("_Read", TokenReading, TokenRanks)
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
        positions: int | Sequence[int] | slice | str | Bool[Tensor, "batch pos"] | None = None,
        calibrate: bool = False,
        model: Any = None,
    ) -> None:
        """Make a hook; see `latentlens_hooks` for the arguments."""
        if top_k < 1:
            raise InvalidInputError(f"got top_k={top_k}; expected at least 1")
        if isinstance(positions, str) and positions != "image":
            raise InvalidInputError(f"got positions={positions!r}; expected 'image', numbers, a slice, or a mask [batch, pos]")
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
        """Capture an activation [batch, pos, ...], or the heads of it that are named.

        Args:
            activation: What the hook point saw; it is not changed.
            hook: The HookPoint.
            name: The hook name it was asked for under; None: the hook point's own name, which on a bridge may be another.

        Raises:
            InvalidInputError: An activation without a vector for each token, or without the heads that are named; or one of
                an image encoder.
        """
        name = str(name or hook.name)
        require_language_model(name)
        batch, pos = activation.shape[:2]
        context = running(batch, pos)
        for one, vectors in activations_by_name(name, activation).items():
            self._keep(one, vectors.clone(), context)
        self._result = None

    def _keep(self, name: str, vectors: Float[Tensor, "batch pos d"], context: RunContext) -> None:
        batch, pos = vectors.shape[:2]
        earlier = self._captured.get(name, [])
        goes_on = bool(earlier) and pos == 1 and earlier[-1].activation.shape[0] == batch and context.goes_on
        if name in self._captured and not goes_on and not _again(name, next(reversed(self._captured))):
            self._captured.clear()  # a new run: what it does not reach must not show the last one
        self._captured[name] = [*(earlier if goes_on else []), _Capture(vectors, context)]

    @property
    def result(self) -> LensResult:
        """What was read from the last run.

        Raises:
            InvalidInputError: No run was captured, or a NaN activation.
            ModelMismatchError: The model that ran is not the bank's.
        """
        if self._result is None:
            model = self._model_that_ran
            if model is not None:
                with without_hooks(model):  # somebody's hooks may change what a replay gives
                    self.index.check_model(model)
            self._result = self._decode(model)
        return self._result

    @property
    def _model_that_ran(self) -> Any:
        if self.model is None and self._captured:
            return next(iter(self._captured.values()))[-1].context.model
        return self.model

    def clear(self) -> None:
        """Forget what was captured."""
        self._captured.clear()
        self._result = None

    def _decode(self, model: Any) -> LensResult:
        if not self._captured:
            raise InvalidInputError(
                "nothing was captured: run the model with these hooks first, "
                "model.run_with_hooks(text, fwd_hooks=latentlens_hooks(index)); where it ran, none of the hook names fired"
            )
        if model is None and (self.logit_lens or self.embedding_lens):
            raise InvalidInputError("the logit lens needs the model: LatentLensHook(index, model=model), or logit_lens=False")
        if model is None and any(head_result_layer(name) is not None for name in self._captured):
            raise InvalidInputError("hook_result[head] is computed with the model's W_O: LatentLensHook(index, model=model)")
        tokens, skipped = self._input(model)
        captures = next(iter(self._captured.values()))
        shape = len(captures[0].activation), sum(capture.activation.shape[1] for capture in captures)
        decoded = self._visual(model, tokens) if isinstance(self.positions, str) else self._chosen(shape, skipped)
        if isinstance(self.positions, str):
            _warn_where_no_image_was(next(iter(self._captured)), self._vectors(next(iter(self._captured)), decoded))
        found, logits, embeddings = {}, {}, {}
        for names, vectors in self._groups(decoded):
            searched = self.index.search(
                vectors, self.top_k, query_hook_name=self._queried_as(names[0]), calibrate=self.calibrate
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

    def follow_tokens(self, tokens: str | int | Sequence[str | int], *, top_k: int = 50) -> FollowedTokens:
        """How each lens ranks chosen tokens at every layer and decoded position of the last run, over the whole vocabulary.

        The lenses that the hooks read are asked again, so the run must be the last one. What they say of a token differs: the
        logit lens, how likely it comes next; LatentLens, which share of the nearest rows it is the token of.

        Args:
            tokens: Single tokens, as text with their leading space (" Paris") or as ids; one or several.
            top_k: How many of the nearest rows to count in.

        Raises:
            InvalidInputError: A text that is not one token, an id outside the vocabulary, or no run.
        """
        result, model = self.result, self._model_that_ran
        if model is None:
            raise InvalidInputError("tokens are followed with the model: LatentLensHook(index, model=model)")
        if top_k < 1:
            raise InvalidInputError(f"got top_k={top_k}; expected at least 1")
        ids = single_tokens(model, [tokens] if isinstance(tokens, str | int) else list(tokens))
        chosen, of_row = torch.tensor(ids), self.index.row_token_ids()
        near, logits, embeddings = {}, {}, {}
        for names, vectors in self._groups(result.decoded):
            found = self.index.search(vectors, top_k, query_hook_name=self._queried_as(names[0])).rows.cpu().numpy()
            near |= _by_name(names, neighbor_ranks(of_row[found], ids))
            if in_residual_stream(names[0]):
                if self.logit_lens:
                    logits |= _by_name(names, logit_ranks(model, vectors, chosen))
                if self.embedding_lens:
                    embeddings |= _by_name(names, embedding_ranks(model, vectors, chosen))
        texts = token_bytes(model, ids)
        shown = tuple(texts[i].decode("utf-8", errors="replace") for i in ids)
        return FollowedTokens(shown, result, top_k, near, logits, embeddings)

    def _groups(self, decoded: Bool[np.ndarray, "batch pos"]) -> Iterator[tuple[list[str], Float[Tensor, "names cells d"]]]:
        """Hook names that are searched and read together, and their vectors."""
        for names in self._alike(int(decoded.sum())):
            yield names, torch.stack([self._vectors(name, decoded) for name in names])

    def _alike(self, cells: int) -> Iterator[list[str]]:
        """Which hook names go together: a search reads every row, however few the queries."""
        groups: dict[Any, list[str]] = {}
        for name, captures in self._captured.items():
            one = captures[0].activation
            alike = (one.shape[-1], one.dtype, one.device, in_residual_stream(name), self._queried_as(name))
            groups.setdefault(alike, []).append(name)
        at_once = max(1, _TOGETHER // max(1, cells))
        for names in groups.values():
            for first in range(0, len(names), at_once):
                yield names[first : first + at_once]

    def _queried_as(self, name: str) -> str | None:
        """As which of its hook names the index searches queries of this name, where it matters to it."""
        name = name if name in self.index.hook_names else name.removesuffix(".hook_sae_input")
        matters = self.index.moves_queries or head_of(name) is not None
        return name if matters and name in self.index.hook_names else None

    def _vectors(self, name: str, decoded: Bool[np.ndarray, "batch pos"]) -> Float[Tensor, "cells d"]:
        activation = torch.cat([capture.activation for capture in self._captured[name]], 1)
        vectors = activation[torch.from_numpy(decoded).to(activation.device)]
        layer, head = head_result_layer(name), head_of(name)
        return vectors if layer is None or head is None else head_output(self._model_that_ran, layer, head, vectors)

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

    def _visual(self, model: Any, tokens: Tensor | None) -> Bool[np.ndarray, "batch pos"]:
        """True at the visual tokens."""
        if tokens is None:
            raise InvalidInputError(
                "positions='image' looks for the image tokens among the input ids, which this run did not show (it was given "
                "embeddings, say); give a mask, True at the visual tokens: positions=mask [batch, pos]"
            )
        return image_positions(model, tokens).cpu().numpy()

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


def _warn_where_no_image_was(name: str, vectors: Float[Tensor, "cells d"]) -> None:
    """A model that was given the ids of an image alone runs on its placeholders, all alike, and says nothing."""
    if len(vectors) > 1 and bool((vectors == vectors[:1]).all()):
        warnings.warn(
            f"all {len(vectors)} visual tokens are the same at {name}: was the image given to the model (pixel_values=)?",
            stacklevel=5,
        )


def _as_mask(positions: Any, shape: tuple[int, int]) -> Bool[np.ndarray, "batch pos"]:
    mask = torch.as_tensor(positions).cpu().numpy()
    if mask.shape != shape or mask.dtype != bool:
        raise InvalidInputError(f"got positions of shape {mask.shape}, {mask.dtype}; expected bool of [batch, pos], {shape}")
    if not mask.any():
        raise InvalidInputError("got positions that are False everywhere; expected True at the tokens to decode")
    return mask


def _again(name: str, last: str) -> bool:
    """True for ln1 of the layer that fired last: HookedTransformer runs it three times, for query, key and value."""
    return ".ln1." in name and name.rpartition(".")[0] == last.rpartition(".")[0]


def _by_name(names: Sequence[str], reading: _Read) -> dict[str, _Read]:
    """A reading of the vectors of several hook names, taken apart."""
    parts = {key: np.split(part, len(names)) for key, part in vars(reading).items() if isinstance(part, np.ndarray)}
    return {name: replace(reading, **{key: part[i] for key, part in parts.items()}) for i, name in enumerate(names)}


class LensHooks(list[tuple[str, Callable[..., Any]]]):
    """A list of (hook name, function) pairs, the shape that TransformerLens takes, with the `result` of the run."""

    def __init__(self, hook: LatentLensHook, hook_names: Sequence[str]) -> None:
        """Bind each requested name to the hook: on a bridge the hook point's own name differs."""
        super().__init__((tl_hook_name(name), partial(hook, name=name)) for name in hook_names)
        self.hook = hook
        self.hook_names = tuple(hook_names)

    def __repr__(self) -> str:
        return f"LensHooks({list(self.hook_names)})"

    @property
    def result(self) -> LensResult:
        """What was read from the last run; see `LatentLensHook.result`.

        Hook names that the run did not reach (`stop_at_layer`) are left out.

        Raises:
            UnknownHookError: A hook name that the model does not have, or that an attached SAE replaces.
            InvalidInputError: A hook name that never fires as the model is set.
        """
        if self.hook._result is None:
            self._check_fired()
        return self.hook.result

    def follow_tokens(self, tokens: str | int | Sequence[str | int], *, top_k: int = 50) -> FollowedTokens:
        """Rank and probability of chosen tokens by layer; see `LatentLensHook.follow_tokens`."""
        self.result  # noqa: B018 - says which hook names did not fire
        return self.hook.follow_tokens(tokens, top_k=top_k)

    def _check_fired(self) -> None:
        """Say which hook names did not fire, but for those behind the last one that did."""
        captured = list(self.hook._captured)
        points = {hook_point(name) for name in captured}
        silent = [name for name in self.hook_names if name not in captured and hook_point(name) not in points]
        model = self.hook._model_that_ran
        if model is not None:
            require_firing(silent, model)
        if captured:
            last = max(forward_order(name) for name in captured)
            if skipped := [name for name in silent if forward_order(name) <= last]:
                warnings.warn(
                    f"{skipped} did not fire in this run, though later hooks did: the model has such hook points and did not "
                    "use them; leave them out",
                    stacklevel=4,
                )

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
    positions: int | Sequence[int] | slice | str | Bool[Tensor, "batch pos"] | None = None,
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
            `model` so that it can be checked. A head that the index holds (`blocks.3.attn.hook_z[5]`) is read among its own
            rows. `blocks.3.attn.hook_result[5]` is what head 5 adds to the residual stream, z @ W_O, and `[:]` is every head.
        top_k: Neighbors, and logit-lens tokens, for each token.
        logit_lens: Read the model's own unembedding beside the neighbors, for activations in the residual stream's space.
        embedding_lens: Read the nearest input embeddings too, for the same activations.
        positions: Decode only these positions (of the batch's padded tokens; negative ones count from the end), or where a
            mask [batch, pos] is True. "image": the visual tokens of a vision-language model's input ids (for a run on merged
            embeddings, which has no ids, give the mask). None: all but BOS and padding, where the run shows its ids.
        calibrate: Also say of each neighbor how likely a random activation comes as near (`Neighbor.chance`), so that
            readings can be compared across layers, and left aside where chance explains them.
        model: The model, where it should not be looked up: for checking hook names, or for calling the hook by hand.

    Raises:
        UnknownHookError: A hook name that neither the index nor the given model has; a head that the index does not hold.
    """
    require_index(index)
    asked = list(index.hook_names) if hook_names is None else [hook_names] if isinstance(hook_names, str) else list(hook_names)
    if not asked:
        raise InvalidInputError("got no hook names; expected at least one, or None for those of the index")
    names = list(dict.fromkeys(one for name in asked for one in _heads_to_read(name, asked, index)))
    plain = [name for name in names if not is_head_name(name)]
    if model is not None:
        check_hook_names([*plain, *map(tl_hook_name, names)], model.hook_dict, type(model).__name__)
    else:
        check_hook_names(plain, index.hook_names, "without model=, the index")
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


def _heads_to_read(name: str, asked: Sequence[str], index: ContextualIndex) -> list[str]:
    """The hook names that one asked for stands for; how many heads `hook_result[:]` has is known when it fires."""
    if not is_head_name(name):
        return [name]
    if head_result_layer(name) is not None:
        everything = f"{hook_point(name)}[:]"
        return [everything if everything in asked else name]
    held = [one for one in index.hook_names if head_of(one) is not None and hook_point(one) == hook_point(name)]
    wanted = held if is_all_heads_name(name) else [one for one in held if one == name]
    if not wanted and re.search(r"attn\.hook_[qkvz]\[", name) is None:
        raise UnknownHookError(f"got {name!r}, which has no heads; those of attention do: 'blocks.0.attn.hook_z[1]'")
    if not wanted:
        raise UnknownHookError(
            f"the index does not hold {name!r}, and a head has a space of its own, in which alone it can be compared: load it, "
            f"ContextualIndex(bank, {name!r}), or read what it adds to the residual stream, 'blocks.L.attn.hook_result[head]'"
        )
    return wanted
