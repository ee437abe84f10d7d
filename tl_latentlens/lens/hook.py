"""The lens hook: it captures activations while the model runs, and decodes them when its result is asked for."""

import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.captures import Captures
from tl_latentlens.lens.compiled import call_in_graph, register
from tl_latentlens.lens.decode import decode_captures, follow_tokens, follow_words
from tl_latentlens.lens.followed import FollowedTokens
from tl_latentlens.lens.result import LensResult
from tl_latentlens.lens.run_context import find_run_context
from tl_latentlens.lens.settings import LensSettings
from tl_latentlens.lens.threads import note_thread
from tl_latentlens.model.fingerprint import is_replaying
from tl_latentlens.model.flatten import activations_by_name
from tl_latentlens.model.hook_names import require_language_model
from tl_latentlens.search.ambient import autocast_as, autocast_state, own_arithmetic


@dataclass
class _Reading:
    """What a thread ran.

    Attributes:
        captures: The activations of its last run.
        result: Their reading; None before it is asked for.
        autocast: Autocast as it was in the last run.
    """

    captures: Captures
    result: LensResult | None = None
    autocast: tuple[tuple[str, torch.dtype], ...] = ()

    def __bool__(self) -> bool:
        """True where there is something to read."""
        return bool(self.captures) or self.result is not None


class LatentLensHook:
    """A hook function, `fn(activation, hook=hook_point)`, that decodes the captured activations when `result` is asked for.

    It never changes the activation, keeps no graph, and returns None. A new run replaces the last one. The tokens that
    `generate` adds one by one are joined to their prompt.

    TransformerLens puts hooks on the model itself, so they fire in the runs of other threads too. What a thread ran is kept
    apart: a thread reads its own last run, or, where it ran nothing, that of the one other thread that did.
    """

    index: ContextualIndex
    settings: LensSettings
    only_reads = True  # said to those who look for hooks that change activations
    _readings: dict[int, _Reading]
    _number: int
    _calls: Tensor

    def __new__(cls, *args: Any, **kwargs: Any):  # what it returns is the class that is called, which Python 3.10 cannot say
        """A hook, or a copy of one, that a compiled model can call."""
        self = super().__new__(cls)
        self._number, self._calls = register(self), torch.zeros((), dtype=torch.long, device="cpu")
        return self

    def __init__(
        self,
        index: ContextualIndex,
        *,
        top_k: int = 5,
        logit_lens: bool = True,
        embedding_lens: bool = False,
        positions: int | Sequence[int] | slice | str | Bool[Tensor, "batch pos"] | None = None,
        calibrate: bool | str = "known",
        words: int = 8,
        distinct: bool = True,
        model: Any = None,
    ) -> None:
        """Make a hook; see `latentlens_hooks` for the arguments."""
        self.index = index
        self.settings = LensSettings(top_k, logit_lens, embedding_lens, positions, calibrate, words, distinct)
        self._given_model = model
        self._readings = {}

    def __getstate__(self) -> dict[str, Any]:
        """Index, settings, and the reading of the last run, which is made now; the model stays in its process."""
        return {"index": self.index, "settings": self.settings, "result": self.result if self._reading() else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with no run but the one that was read."""
        self.index, self.settings, self._given_model = state["index"], state["settings"], None
        self._readings = {get_ident(): _Reading(Captures(), state["result"])}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LatentLensHook":
        """A hook with the same index and model, and the same run so far."""
        memo[id(self)] = same = type(self).__new__(type(self))
        copies = {thread: replace(reading, captures=copy(reading.captures)) for thread, reading in self._readings.items()}
        same.__dict__.update({**vars(self), **vars(same)}, _readings=copies)
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
        if torch.compiler.is_compiling():
            call_in_graph(self._calls, activation.detach(), self._number, name or hook.name)
        else:
            self.capture(activation, str(name or hook.name))

    def capture(self, activation: Tensor, name: str) -> None:
        """Hold an activation of the forward pass that is on the stack; see `__call__`."""
        if is_replaying():
            return
        require_language_model(name)
        batch, pos = activation.shape[:2]
        context = find_run_context(batch, pos, name)
        reading = self._reading_of_thread()
        for hook_name, vectors in activations_by_name(name, activation).items():
            with own_arithmetic():
                reading.captures.add(hook_name, vectors.clone(), context)
        reading.result, reading.autocast = None, autocast_state()
        if context.model is not None:
            note_thread(context.model)

    def _reading_of_thread(self) -> _Reading:
        """What the calling thread ran; what threads that have ended ran is let go of when another begins."""
        thread = get_ident()
        if thread not in self._readings:
            running = sys._current_frames()
            for ended in [other for other in self._readings if other not in running]:
                del self._readings[ended]
            self._readings[thread] = _Reading(Captures(self._given_model))
        return self._readings[thread]

    def _reading(self) -> _Reading:
        """What the calling thread ran, or the one other thread that ran something.

        Raises:
            InvalidInputError: Several other threads did.
        """
        own = self._readings.get(get_ident())
        others = [reading for reading in list(self._readings.values()) if reading]
        if own:
            return own
        if len(others) > 1:
            raise InvalidInputError(
                f"{len(others)} other threads ran the model with these hooks on it, and this one did not; expected one: read "
                "the result in the thread that ran, or call clear() before each run"
            )
        return others[0] if others else _Reading(Captures(self._given_model))

    @property
    def captures(self) -> Captures:
        """The activations of the last run, of the calling thread where it ran something."""
        return self._reading().captures

    @property
    def result(self) -> LensResult:
        """The reading of the last run.

        Raises:
            InvalidInputError: No run was captured, or a NaN activation.
            ModelMismatchError: The model that ran is not the bank's.
        """
        reading = self._reading()
        if reading.result is None:
            if (model := reading.captures.model) is not None:
                with autocast_as(reading.autocast):
                    self.index.check_model(model)
            reading.result = decode_captures(reading.captures, self.index, self.settings)
        return reading.result

    @property
    def is_decoded(self) -> bool:
        """True where the last run was decoded already."""
        return self._reading().result is not None

    def clear(self) -> None:
        """Forget what was captured, in every thread."""
        self._readings = {}

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

    def follow_words(self, words: str | Sequence[str], *, top_k: int = 50, language: str | None = "english") -> FollowedTokens:
        """The share of the nearest contexts that hold chosen words, at every layer and decoded position of the last run.

        It says of what the nearest uses of a token speak: "river" or "money" around "bank". A context is the word of a row's
        token, and the words within eight tokens of it. A word counts whole, in any case, with its inflections.

        Args:
            words: Words of three letters or more, one or several.
            top_k: How many of the nearest rows to count in.
            language: Of the stemmer, as Snowball names it; None: the same letters only.

        Raises:
            InvalidInputError: Something that is not one such word, a language without a stemmer, or no run.
        """
        return follow_words(self.captures, self.index, self.settings, self.result, words, top_k, language)
