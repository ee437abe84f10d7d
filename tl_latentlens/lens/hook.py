"""The lens hook: it captures activations while the model runs, and decodes them when its result is asked for."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.captures import Captures
from tl_latentlens.lens.decode import decode_captures, follow_tokens
from tl_latentlens.lens.followed import FollowedTokens
from tl_latentlens.lens.result import LensResult
from tl_latentlens.lens.run_context import find_run_context
from tl_latentlens.lens.settings import LensSettings
from tl_latentlens.model.fingerprint import is_replaying
from tl_latentlens.model.flatten import activations_by_name
from tl_latentlens.model.hook_names import require_language_model
from tl_latentlens.search.ambient import autocast_as, autocast_state, own_arithmetic


class LatentLensHook:
    """A hook function, `fn(activation, hook=hook_point)`, that decodes the captured activations when `result` is asked for.

    It never changes the activation, keeps no graph, and returns None. A new run replaces the last one. The tokens that
    `generate` adds one by one are joined to their prompt.
    """

    index: ContextualIndex
    settings: LensSettings
    captures: Captures
    only_reads = True  # said to those who look for hooks that change activations
    _result: LensResult | None
    _autocast: tuple[tuple[str, torch.dtype], ...] = ()  # as it was in the last run

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
        self.index = index
        self.settings = LensSettings(top_k, logit_lens, embedding_lens, positions, calibrate)
        self.captures = Captures(model)
        self._result = None

    def __getstate__(self) -> dict[str, Any]:
        """Index, settings, and the reading of the last run, which is made now; the model stays in its process."""
        result = self.result if self.captures else self._result
        return {"index": self.index, "settings": self.settings, "_result": result}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with no run but the one that was read."""
        self.__dict__.update(state, captures=Captures())

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatentLensHook":
        """A hook with the same index and model, and the same run so far."""
        memo[id(self)] = same = type(self).__new__(type(self))
        same.__dict__.update(vars(self), captures=copy(self.captures))
        return same

    def __call__(self, activation: Tensor, hook: Any, name: str | None = None) -> None:
        """Capture an activation [batch, pos, ...], or those of its heads that the name asks for.

        Args:
            activation: The activation at the hook point; it is not changed.
            hook: The HookPoint.
            name: The hook name it was asked for under; None: the hook point's own name, which on a bridge may be another.

        Raises:
            InvalidInputError: An activation without a vector for each token, or without the heads that are named; or one of
                an image encoder.
        """
        if is_replaying():
            return
        name = str(name or hook.name)
        require_language_model(name)
        batch, pos = activation.shape[:2]
        context = find_run_context(batch, pos)
        for hook_name, vectors in activations_by_name(name, activation).items():
            with own_arithmetic():
                self.captures.add(hook_name, vectors.clone(), context)
        self._result = None
        self._autocast = autocast_state()

    @property
    def result(self) -> LensResult:
        """The reading of the last run.

        Raises:
            InvalidInputError: No run was captured, or a NaN activation.
            ModelMismatchError: The model that ran is not the bank's.
        """
        if self._result is None:
            if (model := self.captures.model) is not None:
                with autocast_as(self._autocast):
                    self.index.check_model(model)
            self._result = decode_captures(self.captures, self.index, self.settings)
        return self._result

    @property
    def is_decoded(self) -> bool:
        """True where the last run was decoded already."""
        return self._result is not None

    def clear(self) -> None:
        """Forget what was captured."""
        self.captures.clear()
        self._result = None

    def follow_tokens(self, tokens: str | int | Sequence[str | int], *, top_k: int = 50) -> FollowedTokens:
        """The scores and ranks that each lens gives chosen tokens, at every layer and decoded position of the last run.

        The lenses that the hooks read are asked again, so the run must be the last one. The logit lens says how likely a token
        comes next. It and the embedding lens rank the whole vocabulary. LatentLens says which share of the nearest rows
        it is the token of.

        Args:
            tokens: Single tokens, as text with their leading space (" Paris") or as ids; one or several.
            top_k: How many of the nearest rows to count in.

        Raises:
            InvalidInputError: A text that is not one token, an id outside the vocabulary, or no run.
        """
        return follow_tokens(self.captures, self.index, self.settings, self.result, tokens, top_k)
