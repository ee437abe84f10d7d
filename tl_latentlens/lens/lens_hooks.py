"""Lens hooks for many hook names at once, in the shape that TransformerLens takes."""

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.index.hook_names import requested_hook_names
from tl_latentlens.lens.followed import FollowedTokens
from tl_latentlens.lens.hook import LatentLensHook
from tl_latentlens.lens.result import LensResult
from tl_latentlens.lens.threads import is_shared
from tl_latentlens.model.heads import head_of, head_result_layer, hook_point, is_all_heads_name, is_head_name, tl_hook_name
from tl_latentlens.model.hook_names import check_hook_names, require_firing
from tl_latentlens.model.hook_points import forward_order
from tl_latentlens.model.layers import expand_layers


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
        """The reading of the last run; see `LatentLensHook.result`.

        Hook names that the run did not reach (`stop_at_layer`) are left out.

        Raises:
            UnknownHookError: A hook name that the model does not have, or that an attached SAE replaces.
            InvalidInputError: A hook name that never fires as the model is set.
        """
        if not self.hook.is_decoded:
            self._check_fired()
        return self.hook.result

    def follow_tokens(self, tokens: str | int | Sequence[str | int], *, top_k: int = 50) -> FollowedTokens:
        """Rank and probability of chosen tokens by layer; see `LatentLensHook.follow_tokens`."""
        self.result  # noqa: B018 - says which hook names did not fire
        return self.hook.follow_tokens(tokens, top_k=top_k)

    def follow_words(self, words: str | Sequence[str], *, top_k: int = 50, language: str | None = "english") -> FollowedTokens:
        """The share of the nearest contexts that hold chosen words, by layer; see `LatentLensHook.follow_words`."""
        self.result  # noqa: B018 - says which hook names did not fire
        return self.hook.follow_words(words, top_k=top_k, language=language)

    def _check_fired(self) -> None:
        """Raise or warn for hook names that did not fire; those after the last one that fired are left out."""
        captures = self.hook.captures
        captured = captures.hook_names
        captured_points = {hook_point(name) for name in captured}
        silent = [name for name in self.hook_names if name not in captured and hook_point(name) not in captured_points]
        if captures.model is not None:
            require_firing(silent, captures.model)
            if silent and captured and not captures.stopped_early and is_shared(captures.model):
                raise InvalidInputError(
                    f"{silent} did not fire, and other threads ran this model with hooks on it: TransformerLens keeps hooks on "
                    "the model, and takes those of other threads off; let one thread at a time run it and read its result (by "
                    "a lock), or give each thread a copy (copy.deepcopy(model))"
                )
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
    hook_names: int | str | Iterable[int | str] | None = None,
    *,
    top_k: int = 5,
    logit_lens: bool = True,
    embedding_lens: bool = False,
    positions: int | Sequence[int] | slice | str | Bool[Tensor, "batch pos"] | None = None,
    calibrate: bool | str = "known",
    words: int = 8,
    distinct: bool = True,
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
            Layers stand for their hook_resid_post: 3, -1 (the last), "3-8", range(3, 9); "all" for every layer of the given
            `model`, or else of the index.
        top_k: Neighbors, and logit-lens tokens, for each token.
        logit_lens: Read the model's own unembedding beside the neighbors, for activations in the residual stream's space.
        embedding_lens: Read the nearest input embeddings too, for the same activations.
        positions: Decode only these positions (of the batch's padded tokens; negative ones count from the end), or where a
            mask [batch, pos] is True. "image": the visual tokens of a vision-language model's input ids (for a run on merged
            embeddings, which has no ids, give the mask). None: all but BOS and padding, where the run shows its ids.
        calibrate: "known" says whether the bank knows each token (`Cell.known`), and whether its nearest row is the right use
            of it (`Cell.use_chance`). Tables and pages show a token faint where `known` is at most 0.05. The first reading
            takes as long as 256 queries more for each hook name. True also says how likely a random activation comes as near
            to each neighbor and word (`Neighbor.chance`). False does without.
        words: The nearest *other* words of each token (`Cell.words`), so many; 0: none. The nearest uses of a token are
            mostly of its own word; the other words say what it means here. They are words of three letters or more that rows of
            the token's own layer end, each once, without the token's own word and its inflections (English;
            `ContextualIndex.search_words` takes other languages). There are none for punctuation, digits, and layers in the
            first fifth of the model. Of visual tokens no word is left out. Beside them stand up to five words around the
            nearest uses of the token (`Cell.around`, `ContextualIndex.words_around`).
        distinct: List each row once, at its best hook name (`Neighbor.hook_names` has the others); False: at each hook name at
            which it is near.
        model: The model, where it should not be looked up: for checking hook names, or for calling the hook by hand.

    Raises:
        UnknownHookError: A hook name that neither the index nor the given model has; a head that the index does not hold.
    """
    require_index(index)
    requested = _requested_hook_names(index, hook_names, model)
    if not requested:
        raise InvalidInputError("got no hook names; expected at least one, or None for those of the index")
    names = list(dict.fromkeys(read for name in requested for read in _names_to_read(name, requested, index)))
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
        words=words,
        distinct=distinct,
        model=model,
    )
    return LensHooks(hook, names)


def _requested_hook_names(index: ContextualIndex, hook_names: int | str | Iterable[int | str] | None, model: Any) -> list[str]:
    if hook_names is None:
        return list(index.hook_names)
    if model is None:
        return requested_hook_names(hook_names, index.bank_rows, index.hook_names)
    return expand_layers(hook_names, model.cfg.n_layers)


def _names_to_read(name: str, requested: Sequence[str], index: ContextualIndex) -> list[str]:
    """The hook names that a requested name stands for; the heads of `hook_result[:]` are known only when it fires."""
    if not is_head_name(name):
        return [name]
    if head_result_layer(name) is not None:
        all_heads = f"{hook_point(name)}[:]"
        return [all_heads if all_heads in requested else name]
    indexed = [held for held in index.hook_names if head_of(held) is not None and hook_point(held) == hook_point(name)]
    heads = indexed if is_all_heads_name(name) else [held for held in indexed if held == name]
    if not heads and re.search(r"attn\.hook_[qkvz]\[", name) is None:
        raise UnknownHookError(f"got {name!r}, which has no heads; those of attention do: 'blocks.0.attn.hook_z[1]'")
    if not heads:
        raise UnknownHookError(
            f"the index does not hold {name!r}, and a head has a space of its own, in which alone it can be compared: load it, "
            f"ContextualIndex(bank, {name!r}), or read what it adds to the residual stream, 'blocks.L.attn.hook_result[head]'"
        )
    return heads
