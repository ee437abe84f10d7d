"""Rows of a bank that are held out, and the rows that stand for them: neighbors in other prompts, and random rows."""

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_latentlens.bank.bank import Bank
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex

_MIN_INFORMATIVE_ROWS = 30
_N_SPARE_ROWS = 16  # Rows beyond those asked for: some are of the same prompt and are dropped.


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    """Rows of a bank that are read as if their prompts were not in it.

    Attributes:
        rows: Their row numbers. A token follows each of them in its prompt.
        bank: The bank.
    """

    rows: Int[np.ndarray, " held_out"]
    bank: Bank

    @property
    def token_ids(self) -> Int[np.ndarray, " held_out"]:
        """Their token ids."""
        return self.bank.plan.tokens[self.bank.plan.row_tokens[self.rows]]

    def activations(self, hook_name: str) -> Float[np.ndarray, "held_out d"]:
        """Their activations, float32."""
        return self.bank.activations(hook_name, self.rows)


def draw_held_out_rows(bank: Bank, n: int, seed: int) -> HeldOutRows:
    """Up to n random rows that a token follows. Warns two calls up where there are few.

    Raises:
        InvalidInputError: There are none.
    """
    plan = bank.plan
    followed = np.flatnonzero(plan.row_tokens + 1 < plan.prompt_starts[plan.row_prompts + 1])
    if not len(followed):
        raise InvalidInputError(f"{bank.path} has no row with a token after it; evaluate a bank of longer texts")
    if len(followed) < _MIN_INFORMATIVE_ROWS:
        warnings.warn(f"only {len(followed)} tokens of {bank.path} can be read; figures of so few say little", stacklevel=3)
    drawn = np.random.default_rng(seed).choice(followed, min(n, len(followed)), replace=False)
    return HeldOutRows(np.sort(drawn), bank)


def shares_context(held_out: HeldOutRows, rows: Int[np.ndarray, "held_out k"]) -> Bool[np.ndarray, "held_out k"]:
    """True for rows of the held-out row's own prompt, and of prompts that are equal to it up to the held-out row."""
    plan = held_out.bank.plan
    prompts, own_prompts = plan.row_prompts[rows], plan.row_prompts[held_out.rows]
    shared = prompts == own_prompts[:, None]
    starts, lengths = plan.prompt_starts[:-1], np.diff(plan.prompt_starts)
    positions = plan.row_tokens[held_out.rows] - starts[own_prompts]
    # Few prompts have the held-out row's token at its position. Only those are compared token by token.
    may_share = ~shared & (lengths[prompts] > positions[:, None])
    places = np.where(may_share, starts[prompts] + positions[:, None], 0)
    may_share &= plan.tokens[places] == held_out.token_ids[:, None]
    for i, k in zip(*may_share.nonzero(), strict=True):
        start, own_start, length = starts[prompts[i, k]], starts[own_prompts[i]], positions[i] + 1
        shared[i, k] = np.array_equal(plan.tokens[start : start + length], plan.tokens[own_start : own_start + length])
    return shared


def neighbors_in_other_prompts(
    index: ContextualIndex, held_out: HeldOutRows, hook_name: str, top_k: int
) -> Int[np.ma.MaskedArray, "held_out k"]:
    """The k nearest rows of the same hook name in other prompts, nearest first; masked where there are fewer."""
    found = index.search(held_out.activations(hook_name), top_k + _N_SPARE_ROWS, hook_name, hook_name)
    neighbors = _first_in_other_prompts(held_out, found.rows.cpu().numpy(), top_k)
    missing = ((0, 0), (0, top_k - neighbors.shape[1]))
    return np.ma.array(np.pad(neighbors.data, missing), mask=np.pad(neighbors.mask, missing, constant_values=True))


def random_rows_in_other_prompts(
    held_out: HeldOutRows, k: int, rng: np.random.Generator, token_ids: Int[np.ndarray, " held_out"] | None = None
) -> Int[np.ma.MaskedArray, "held_out k"]:
    """Random rows of other prompts, masked where too few of those drawn are.

    Args:
        held_out: The rows that are held out.
        k: Rows for each.
        rng: The generator.
        token_ids: The token that the rows have, for each held-out row; None: any token.
    """
    row_token_ids = held_out.bank.plan.tokens[held_out.bank.plan.row_tokens]
    n_held_out = len(held_out.rows)
    if token_ids is None:
        drawn = rng.integers(0, len(row_token_ids), (n_held_out, k + _N_SPARE_ROWS))
    else:
        rows_by_token = np.argsort(row_token_ids, kind="stable")
        first, end = (np.searchsorted(row_token_ids[rows_by_token], token_ids, side) for side in ("left", "right"))
        steps = rng.random((n_held_out, k + _N_SPARE_ROWS)) * (end - first)[:, None]
        drawn = rows_by_token[np.minimum(first[:, None] + steps.astype(np.int64), len(rows_by_token) - 1)]
        drawn = np.where((end > first)[:, None], drawn, held_out.rows[:, None])  # Its own row, which is dropped below.
    return _first_in_other_prompts(held_out, drawn, k)


def _first_in_other_prompts(
    held_out: HeldOutRows, rows: Int[np.ndarray, "held_out n"], k: int
) -> Int[np.ma.MaskedArray, "held_out k"]:
    """The first k rows of other prompts; masked where there are fewer."""
    is_excluded = shares_context(held_out, rows)
    order = np.argsort(is_excluded, axis=1, kind="stable")[:, :k]
    return np.ma.array(np.take_along_axis(rows, order, 1), mask=np.take_along_axis(is_excluded, order, 1))
