"""The rows of several banks, counted as one list: their texts, tokens, prompts and activations."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tl_latentlens.bank.bank import Bank, Row
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.model.heads import hook_point


class PlacedBank(NamedTuple):
    """A bank among others.

    Attributes:
        first_row: The row, counted through all banks, of the bank's row 0.
        bank: The bank.
    """

    first_row: int
    bank: Bank


class BankRows:
    """The rows of banks of one model, one bank's after the other's. Banks with the same plan share their rows."""

    banks: tuple[Bank, ...]
    n_rows: int
    _placed: list[PlacedBank]

    def __init__(self, banks: Sequence[Bank]) -> None:
        """Count the rows.

        Args:
            banks: At least one.
        """
        self.banks = tuple(banks)
        first_row_of_plan: dict[str, int] = {}
        self.n_rows = 0
        for bank in self.banks:
            if bank.plan_digest not in first_row_of_plan:
                first_row_of_plan[bank.plan_digest] = self.n_rows
                self.n_rows += bank.n_rows
        self._placed = [PlacedBank(first_row_of_plan[bank.plan_digest], bank) for bank in self.banks]

    @property
    def hook_names(self) -> list[str]:
        """The hook names of all banks, each once, in the order of the banks."""
        return list(dict.fromkeys(name for bank in self.banks for name in bank.hook_names))

    @cached_property
    def by_plan(self) -> list[PlacedBank]:
        """One bank of each plan, in row order; of banks with the same rows, the first."""
        first_of_plan: dict[int, PlacedBank] = {}
        for placed in self._placed:
            first_of_plan.setdefault(placed.first_row, placed)
        return sorted(first_of_plan.values(), key=lambda placed: placed.first_row)

    def of(self, hook_name: str) -> list[PlacedBank]:
        """One bank of each plan that holds a hook name, or the hook name of a head, in row order."""
        first_of_plan: dict[int, PlacedBank] = {}
        for placed in self._placed:
            if hook_point(hook_name) in placed.bank.hook_names:
                first_of_plan.setdefault(placed.first_row, placed)
        return sorted(first_of_plan.values(), key=lambda placed: placed.first_row)

    def row(self, row: int) -> Row:
        """The contextual token of a row.

        Raises:
            InvalidInputError: No such row.
        """
        if not 0 <= row < self.n_rows:
            raise InvalidInputError(f"got row {row}; the index has rows 0 to {self.n_rows - 1}")
        first_row, bank = self.by_plan[bisect_right(self._first_rows, row) - 1]
        return bank.row(row - first_row)

    def row_ids(self, hook_name: str) -> Int[np.ndarray, " rows"]:
        """The rows that have a vector for a hook name, ascending."""
        return np.concatenate([first_row + np.arange(bank.n_rows) for first_row, bank in self.of(hook_name)])

    def token_ids(self, ahead: int = 0) -> Int[np.ndarray, " rows"]:
        """The token id at each row, or some tokens ahead of it in its prompt; -1 past the prompt's end."""
        return np.concatenate([plan_token_ids(bank.plan, slice(None), ahead) for _, bank in self.by_plan])

    @cached_property
    def prompts(self) -> Int[np.ndarray, " rows"]:
        """The prompt of each row, counted through all banks."""
        plans = [bank.plan for _, bank in self.by_plan]
        first_prompts = np.cumsum([0, *(plan.n_prompts for plan in plans[:-1])])
        return np.concatenate([plan.row_prompts + first for plan, first in zip(plans, first_prompts, strict=True)])

    @cached_property
    def distinct_prompts(self) -> Int[np.ndarray, " rows"]:
        """The prompt of each row, as `prompts`; prompts of several banks that have the same tokens share one number."""
        if len(self.by_plan) == 1:  # A bank holds each prefix once, so no two of its prompts with rows are the same.
            return self.prompts
        numbers: dict[bytes, int] = {}
        plans = [bank.plan for _, bank in self.by_plan]
        spans = [(plan, *span) for plan in plans for span in pairwise(plan.prompt_starts.tolist())]
        distinct = [numbers.setdefault(plan.tokens[start:end].tobytes(), len(numbers)) for plan, start, end in spans]
        return np.array(distinct)[self.prompts]

    def activations(self, hook_name: str, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """The banked activations of rows, float32; zeros for rows that have none for this hook name."""
        placed_banks = self.of(hook_name)
        activations = np.zeros((len(rows), placed_banks[0].bank.d(hook_name)), np.float32)
        for first_row, bank in placed_banks:
            is_of_bank = (rows >= first_row) & (rows < first_row + bank.n_rows)
            activations[is_of_bank] = bank.activations(hook_name, rows[is_of_bank] - first_row)
        return activations

    @cached_property
    def _first_rows(self) -> list[int]:
        return [placed.first_row for placed in self.by_plan]


def plan_token_ids(plan: Plan, rows: slice | Int[np.ndarray, " n"], ahead: int = 0) -> Int[np.ndarray, " n"]:
    """The token ids at rows of a plan, or some tokens ahead of them in their prompts; -1 past a prompt's end."""
    places, prompt_ends = plan.row_tokens[rows] + ahead, plan.prompt_starts[plan.row_prompts[rows] + 1]
    return np.where(places < prompt_ends, plan.tokens[np.minimum(places, len(plan.tokens) - 1)], -1)
