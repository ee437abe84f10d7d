"""Hooks of a steered run: one adds a vector to the stream, the other reads the stream and compares it with another run's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.hook import LatentLensHook
from tl_latentlens.lens.result import LensResult
from tl_latentlens.lens.run_context import find_run_context
from tl_latentlens.model.flatten import flat_activation


class AddVector:
    """A hook function that returns the activation plus a vector, at the chosen positions; see `SteeringLens`."""

    def __init__(self, vector: Float[Tensor, " d"], name: str, positions: int | Sequence[int] | slice | None = None) -> None:
        """Add `vector` at the hook name `name`; positions None: everywhere."""
        self.vector, self.name = vector, name
        self.positions = [int(positions)] if isinstance(positions, int | np.integer) else positions
        self._length = 0

    def __repr__(self) -> str:
        return f"AddVector(length {float(self.vector.norm()):.3g} at {self.name})"

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        """The changed activation, a new tensor of the same dtype and device."""
        batch, pos = activation.shape[:2]
        width = flat_activation(self.name, activation, (batch, pos)).shape[-1]
        if width != len(self.vector):
            raise InvalidInputError(f"got a steering vector of width {len(self.vector)}; {self.name} has width {width}")
        changed = activation + self.vector.to(activation).view(activation.shape[2:])
        if self.positions is None:
            return changed
        # `generate` adds tokens one by one. Their positions go on from those of the prompt.
        n_cached = self._n_cached(batch, pos)
        if n_cached is None:  # one more token, of a cache that does not show its length
            n_cached = self._length if pos == 1 else 0
        self._length = n_cached + pos
        is_chosen_position = np.zeros(self._length, bool)
        try:
            is_chosen_position[self.positions if isinstance(self.positions, slice) else list(self.positions)] = True
        except IndexError as error:
            raise InvalidInputError(f"positions={self.positions!r} is outside the run's {pos} positions") from error
        is_chosen = torch.from_numpy(is_chosen_position[-pos:]).to(activation.device)
        return torch.where(is_chosen.view(-1, *[1] * (activation.ndim - 2)), changed, activation)

    def _n_cached(self, batch: int, pos: int) -> int | None:
        """The number of tokens before these; None where the running pass does not show it."""
        if not torch.compiler.is_compiling():
            return find_run_context(batch, pos, self.name).n_cached
        if pos == 1:
            raise InvalidInputError(
                "got positions for a vector in a compiled model that runs one token, whose position is not known there; run "
                "the model itself, or give positions=None"
            )
        return 0


class ComparingHook(LatentLensHook):
    """A lens hook whose activations can be compared with those of another."""

    @property
    def has_run(self) -> bool:
        """True where there is something to read."""
        return bool(self.captures)

    def cosines(self, other: "ComparingHook") -> dict[str, Float[np.ndarray, " cells"]]:
        """Cosine of each decoded activation with that of another run, NaN where the tokens up to there are not the same."""
        result, other_result = self.result, other.result
        mask, other_mask = _same_prefix_masks(result, other_result)
        cosines = {}
        for name in result.hook_names:
            cosines[name] = np.full(len(result.positions), np.nan, np.float32)
            if name in other_result.hook_names:
                pair = self.captures.vectors(name, mask).float(), other.captures.vectors(name, other_mask).float()
                cosines[name][mask[result.decoded]] = torch.cosine_similarity(*pair, dim=-1).clamp(-1, 1).cpu().numpy()
        return cosines


def _same_prefix_masks(first: LensResult, second: LensResult) -> list[Bool[np.ndarray, "batch pos"]]:
    """For each of two readings, True where both decoded the same token after the same tokens."""
    masks = [np.zeros(result.decoded.shape, bool) for result in (first, second)]
    if len(first.decoded) == len(second.decoded):
        n_pos = min(first.decoded.shape[1], second.decoded.shape[1])
        is_same = first.decoded[:, :n_pos] & second.decoded[:, :n_pos]
        if first.tokens is not None and second.tokens is not None:
            tokens, other_tokens = (
                np.array([row[:n_pos] for row in result_tokens], object) for result_tokens in (first.tokens, second.tokens)
            )
            is_same &= np.logical_and.accumulate(tokens == other_tokens, axis=1)
        for mask in masks:
            mask[:, :n_pos] = is_same
    return masks
