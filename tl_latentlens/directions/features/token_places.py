"""The tokens of an index's banks, counted through all banks: the windows of tokens around rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from tl_latentlens.bank.bank import Bank
from tl_latentlens.index.rows import BankRows
from tl_latentlens.index.search_result import SearchedIndex


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """The tokens of an index's banks, one bank after the other; a *place* counts through all of them.

    Attributes:
        bank_rows: The rows of the banks.
        bank_starts: The place of each bank's first token, and the end.
        prompt_starts: The place of each prompt's first token, and the end.
        row_places: The place of each row, ascending.
    """

    bank_rows: BankRows
    bank_starts: Int[np.ndarray, " banks_and_end"]
    prompt_starts: Int[np.ndarray, " prompts_and_end"]
    row_places: Int[np.ndarray, " rows"]

    def windows(self, rows: Int[np.ndarray, "..."], before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
        """First place and end of at most `before` and `after` tokens around each row, within its prompt."""
        places = self.row_places[rows]
        prompts = np.searchsorted(self.prompt_starts, places, "right")
        first = np.maximum(places - before, self.prompt_starts[prompts - 1])
        return first, np.minimum(places + after + 1, self.prompt_starts[prompts])

    def by_bank(self, places: Int[np.ndarray, " n"]) -> Iterator[tuple[Bank, int, Int[np.ndarray, " in_bank"]]]:
        """Ascending places, bank by bank: each bank that has any, the place of its first token, and the places in it."""
        banks = [bank for _, bank in self.bank_rows.by_plan]
        for bank, start, end in zip(banks, self.bank_starts[:-1], self.bank_starts[1:], strict=True):
            in_bank = places[slice(*np.searchsorted(places, [start, end]))]
            if len(in_bank):
                yield bank, int(start), in_bank


def token_places(index: SearchedIndex) -> TokenPlaces:
    """The places of an index's tokens, prompts and rows."""
    plans = [bank.plan for _, bank in index.bank_rows.by_plan]
    starts = np.cumsum([0, *(len(plan.tokens) for plan in plans)])
    prompt_starts = [plan.prompt_starts[:-1] + start for plan, start in zip(plans, starts, strict=False)]
    row_places = [plan.row_tokens + start for plan, start in zip(plans, starts, strict=False)]
    return TokenPlaces(index.bank_rows, starts, np.concatenate([*prompt_starts, starts[-1:]]), np.concatenate(row_places))


def concatenated_ranges(first: Int[np.ndarray, " n"], end: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """Whole numbers from each first to its end, one range after the other: of [5, 1] and [7, 2] they are [5, 6, 1]."""
    sizes = end - first
    return np.repeat(first - (sizes.cumsum() - sizes), sizes) + np.arange(sizes.sum())
