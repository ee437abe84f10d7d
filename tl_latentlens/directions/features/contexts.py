"""Contexts: pieces of at most 32 tokens of a prompt, in which a feature is active or silent."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.directions.features.held_out import held_out_rows
from tl_latentlens.directions.features.samples import ActivePairs
from tl_latentlens.index.rows import BankRows
from tl_latentlens.statistics.keyed_random import keyed_hash

CONTEXT_TOKENS = 32
"""Tokens of a context, as many as Delphi shows (Paulo et al., arXiv 2410.13928)."""
N_SILENT = 256
"""Contexts of each side, held out or not, among which those without a feature are looked up."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """The contexts of the rows of a hook name; the rows of each stand side by side.

    Attributes:
        of_rows: The context of each row of the index, ascending; -1 for rows that the hook name does not have.
        first_rows, end_rows: The first row of each context, and the row after its last.
        is_held_out: True for contexts of held-out prompts.
    """

    of_rows: Int[np.ndarray, " rows"]
    first_rows: Int[np.ndarray, " contexts"]
    end_rows: Int[np.ndarray, " contexts"]
    is_held_out: Bool[np.ndarray, " contexts"]

    def end_of_chunk(self, first_row: int, n_rows: int) -> int:
        """The end of the contexts that fit into so many rows from the first row of one on; of one context at least."""
        fitting = np.searchsorted(self.end_rows, first_row + n_rows, "right") - 1
        return int(self.end_rows[max(fitting, self.of_rows[first_row])])

    def sampled(self, seed: int) -> Int[np.ndarray, " contexts"]:
        """Up to `N_SILENT` contexts that are held out and as many that are not, drawn by a hash, ascending."""
        hashes = keyed_hash(np.arange(len(self.is_held_out)), np.zeros(len(self.is_held_out), np.int64), seed)
        order = np.argsort(hashes)
        sides = [order[self.is_held_out[order] == side][:N_SILENT] for side in (False, True)]
        return np.sort(np.concatenate(sides))


def contexts_of(bank_rows: BankRows, hook_name: str) -> Contexts:
    """The contexts of the rows of a hook name."""
    of_rows = np.full(bank_rows.n_rows, -1)
    first_rows, end_rows = [], []
    n_contexts = 0
    for first_row, bank in bank_rows.of(hook_name):
        plan = bank.plan
        pieces = (plan.row_tokens - plan.prompt_starts[plan.row_prompts]) // CONTEXT_TOKENS
        begins = np.flatnonzero(np.append(True, (np.diff(plan.row_prompts) > 0) | (np.diff(pieces) != 0)))
        ends = np.append(begins[1:], bank.n_rows)
        of_rows[first_row : first_row + bank.n_rows] = n_contexts + np.repeat(np.arange(len(begins)), ends - begins)
        first_rows.append(first_row + begins)
        end_rows.append(first_row + ends)
        n_contexts += len(begins)
    starts = np.concatenate(first_rows)
    return Contexts(of_rows, starts, np.concatenate(end_rows), held_out_rows(bank_rows)[starts])


class ContextMaxima:
    """The largest activation of each feature in each of some contexts, and the row that has it."""

    def __init__(self, pairs: ActivePairs, contexts: Int[Tensor, " pairs"], n_contexts: int, n_features: int) -> None:
        """Find the largest.

        Args:
            pairs: Activations on all rows of the contexts.
            contexts: The context of each pair, from 0 to `n_contexts` - 1.
            n_contexts: How many there are.
            n_features: How many features there are.
        """
        self._shape = n_contexts, n_features
        cells = contexts * n_features + pairs.places
        flat = pairs.activations.new_zeros(n_contexts * n_features)
        self._flat = flat.scatter_reduce_(0, cells, pairs.activations, "amax")
        is_largest = pairs.activations == self._flat[cells]
        order = torch.arange(len(cells), device=cells.device)
        first = torch.full_like(self._flat, len(cells), dtype=torch.int64)
        first.scatter_reduce_(0, cells[is_largest], order[is_largest], "amin")
        self.pairs = pairs.select(first[first < len(cells)])
        """One pair for each context and feature: the first of those with the largest activation."""

    @cached_property
    def is_active(self) -> Bool[Tensor, "contexts features"]:
        """Where a feature is active."""
        return (self._flat > 0).view(self._shape)


@dataclass(frozen=True, eq=False)
class SilentContexts:
    """Contexts drawn for all features, and which features are active in them.

    Attributes:
        contexts: The contexts.
        is_held_out: True for those that are held out.
        is_active: True where a requested feature is active.
    """

    contexts: Int[np.ndarray, " n"]
    is_held_out: Bool[np.ndarray, " n"]
    is_active: Bool[np.ndarray, "n f"]
