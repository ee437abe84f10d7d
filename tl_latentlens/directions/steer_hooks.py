"""Hooks that steer: one adds a vector to the stream, another reads it as a lens hook does and compares it with another run."""

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
        # The tokens that `generate` adds one by one are counted on from the prompt's.
        self._length = self._length + 1 if pos == 1 and find_run_context(batch, pos).continues_generation else pos
        chosen = np.zeros(self._length, bool)
        try:
            chosen[self.positions if isinstance(self.positions, slice) else list(self.positions)] = True
        except IndexError as error:
            raise InvalidInputError(f"positions={self.positions!r} is outside the run's {pos} positions") from error
        at = torch.from_numpy(chosen[-pos:]).to(activation.device)
        return torch.where(at.view(-1, *[1] * (activation.ndim - 2)), changed, activation)


class ComparingHook(LatentLensHook):
    """A lens hook whose activations can be compared with those of another."""

    @property
    def has_run(self) -> bool:
        """True where there is something to read."""
        return bool(self.captures)

    def cosines(self, other: "ComparingHook") -> dict[str, Float[np.ndarray, " cells"]]:
        """Cosine of each decoded activation with that of another run, NaN where the tokens up to there are not the same."""
        mine, theirs = self.result, other.result
        here, there = _shared(mine, theirs)
        found = {}
        for name in mine.hook_names:
            found[name] = np.full(len(mine.positions), np.nan, np.float32)
            if name in theirs.hook_names:
                pair = self.captures.vectors(name, here).float(), other.captures.vectors(name, there).float()
                found[name][here[mine.decoded]] = torch.cosine_similarity(*pair, dim=-1).clamp(-1, 1).cpu().numpy()
        return found


def _shared(mine: LensResult, theirs: LensResult) -> list[Bool[np.ndarray, "batch pos"]]:
    """For each of two readings, True where both decoded the same token after the same tokens."""
    sides = (mine, theirs)
    shared = [np.zeros(side.decoded.shape, bool) for side in sides]
    if len(mine.decoded) == len(theirs.decoded):
        pos = min(side.decoded.shape[1] for side in sides)
        same = mine.decoded[:, :pos] & theirs.decoded[:, :pos]
        if mine.tokens is not None and theirs.tokens is not None:
            first, second = (np.array([row[:pos] for row in tokens], object) for tokens in (mine.tokens, theirs.tokens))
            same &= np.logical_and.accumulate(first == second, axis=1)
        for part in shared:
            part[:, :pos] = same
    return shared
