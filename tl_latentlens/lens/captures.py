"""The activations that hooks captured in the last run, and what that run showed of its model and tokens."""

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.lens.run_context import RunContext, skipped_positions
from tl_latentlens.model.head_outputs import head_output
from tl_latentlens.model.heads import head_of, head_result_layer


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

    A new run replaces the last one. Tokens that `generate` adds one by one are joined to their prompt.
    """

    def __init__(self, model: Any = None) -> None:
        """Hold nothing yet.

        Args:
            model: The model that will run; None: it is found in the run's context.
        """
        self._given_model = model
        self._of_hook_name: dict[str, list[_Capture]] = {}

    def __copy__(self) -> "Captures":
        """The same run, held apart: a new run of either does not reach the other."""
        same = Captures()
        same.__dict__.update({name: copy(value) if isinstance(value, dict) else value for name, value in vars(self).items()})
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
        return len(self._first[0].activation), sum(capture.activation.shape[1] for capture in self._first)

    @property
    def _first(self) -> list[_Capture]:
        return next(iter(self._of_hook_name.values()))

    def add(self, hook_name: str, activation: Float[Tensor, "batch pos d"], context: RunContext) -> None:
        """Hold an activation; the first one of a new run first lets go of the last run."""
        batch, pos = activation.shape[:2]
        earlier = self._of_hook_name.get(hook_name, [])
        continues = bool(earlier) and pos == 1 and earlier[-1].activation.shape[0] == batch and context.continues_generation
        if earlier and not continues and not _is_repeated_ln1(hook_name, self.hook_names[-1]):
            self._of_hook_name.clear()  # hook names that the new run does not reach must not show the last one
        self._of_hook_name[hook_name] = [*(earlier if continues else []), _Capture(activation, context)]

    def clear(self) -> None:
        """Hold nothing any more."""
        self._of_hook_name.clear()

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


def _is_repeated_ln1(hook_name: str, last_hook_name: str) -> bool:
    """True for ln1 of the layer that fired last: HookedTransformer runs it three times, for query, key and value."""
    return ".ln1." in hook_name and hook_name.rpartition(".")[0] == last_hook_name.rpartition(".")[0]
