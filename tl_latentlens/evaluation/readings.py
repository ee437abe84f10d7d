"""Tokens of a bank read by their neighbors in other prompts, and by rows drawn at random: what evaluations compare."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_latentlens.bank.bank import Bank
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex

_FEW = 30  # tokens: fewer say nothing
_MORE = 16  # neighbors looked at beyond those asked for, since some are of the same prompt
NULLS = ("same token", "random")


@dataclass(frozen=True, eq=False)
class Cells:
    """Rows of a bank that are read as if their prompts were not in it.

    Attributes:
        rows: Their row numbers, each with a token after it.
        bank: The bank.
    """

    rows: Int[np.ndarray, " cells"]
    bank: Bank

    def activations(self, hook_name: str) -> Float[np.ndarray, "cells d"]:
        """Their activations, float32."""
        return self.bank.activations(hook_name, self.rows)

    def tokens_at(self, rows: Int[np.ndarray, " n"], ahead: int = 0) -> Int[np.ndarray, " n"]:
        """The token ids at rows of the bank, or some tokens ahead of them in their prompts; -1 past a prompt's end."""
        plan = self.bank.plan
        at, end = plan.row_tokens[rows] + ahead, plan.prompt_starts[plan.row_prompts[rows] + 1]
        return np.where(at < end, plan.tokens[np.minimum(at, len(plan.tokens) - 1)], -1)


def draw_cells(bank: Bank, n: int, seed: int) -> Cells:
    """Up to n random rows that have a token after them.

    Raises:
        InvalidInputError: There are none.
    """
    plan = bank.plan
    followed = np.flatnonzero(plan.row_tokens + 1 < plan.prompt_starts[plan.row_prompts + 1])
    if not len(followed):
        raise InvalidInputError(f"{bank.path} has no row with a token after it; evaluate a bank of longer texts")
    if len(followed) < _FEW:
        warnings.warn(f"only {len(followed)} tokens of {bank.path} can be read; figures of so few say little", stacklevel=3)
    chosen = np.random.default_rng(seed).choice(followed, min(n, len(followed)), replace=False)
    return Cells(np.sort(chosen), bank)


def left_out(cells: Cells, rows: Int[np.ndarray, "cells k"]) -> Bool[np.ndarray, "cells k"]:
    """True for rows of a cell's own prompt, or of another one that begins as it does up to the cell."""
    plan = cells.bank.plan
    prompts, own = plan.row_prompts[rows], plan.row_prompts[cells.rows]
    same = prompts == own[:, None]
    starts, lengths = plan.prompt_starts[:-1], np.diff(plan.prompt_starts)
    at = plan.row_tokens[cells.rows] - starts[own]
    # Few prompts have a cell's token at the cell's position: only those are compared whole.
    could = ~same & (lengths[prompts] > at[:, None])
    places = np.where(could, starts[prompts] + at[:, None], 0)
    could &= plan.tokens[places] == plan.tokens[plan.row_tokens[cells.rows]][:, None]
    for cell, k in zip(*could.nonzero(), strict=True):
        first, mine, length = starts[prompts[cell, k]], starts[own[cell]], at[cell] + 1
        same[cell, k] = np.array_equal(plan.tokens[first : first + length], plan.tokens[mine : mine + length])
    return same


def neighbors_elsewhere(index: ContextualIndex, cells: Cells, hook_name: str, top_k: int) -> Int[np.ndarray, "cells k"]:
    """The k nearest rows of the same hook name in other prompts, nearest first; -1 where there are fewer."""
    found = index.search(cells.activations(hook_name), top_k + _MORE, hook_name, hook_name).rows.cpu().numpy()
    order = np.argsort(left_out(cells, found), axis=1, kind="stable")[:, :top_k]
    rows = np.take_along_axis(found, order, 1)
    rows = np.where(np.take_along_axis(left_out(cells, found), order, 1), -1, rows)
    return np.pad(rows, ((0, 0), (0, top_k - rows.shape[1])), constant_values=-1)


def random_rows(
    cells: Cells, k: int, rng: np.random.Generator, token_ids: Sequence[int] | np.ndarray | None = None
) -> Int[np.ndarray, "cells k"]:
    """Rows of other prompts drawn at random, of the given token for each cell (None: of any); -1 where none was found."""
    of_row = cells.bank.plan.tokens[cells.bank.plan.row_tokens]
    if token_ids is None:
        drawn = rng.integers(0, len(of_row), (len(cells.rows), k + _MORE))
    else:
        by_token = np.argsort(of_row, kind="stable")
        first, last = (np.searchsorted(of_row[by_token], token_ids, side) for side in ("left", "right"))
        spread = rng.random((len(cells.rows), k + _MORE)) * (last - first)[:, None]
        drawn = by_token[np.minimum(first[:, None] + spread.astype(np.int64), len(by_token) - 1)]
        drawn = np.where((last > first)[:, None], drawn, cells.rows[:, None])
    refused = left_out(cells, drawn)
    order = np.argsort(refused, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(refused, order, 1), -1, np.take_along_axis(drawn, order, 1))
