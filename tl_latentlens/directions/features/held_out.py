"""The prompts that labels are not made from, on which they are scored."""

import numpy as np
from jaxtyping import Bool

from tl_latentlens.bank.bank import Bank
from tl_latentlens.index.rows import BankRows
from tl_latentlens.statistics.keyed_random import keyed_hash

HELD_OUT_EVERY = 3
"""One prompt in so many is held out."""


def held_out_rows(bank_rows: BankRows) -> Bool[np.ndarray, " rows"]:
    """True for the rows of held-out prompts.

    A third of the prompts, by a hash of their tokens: a text is on the same side in every bank of a model, whatever else the
    bank holds.
    """
    of_banks = [held_out_prompts(bank)[bank.plan.row_prompts] for _, bank in bank_rows.by_plan]
    return np.concatenate(of_banks)


def held_out_prompts(bank: Bank) -> Bool[np.ndarray, " prompts"]:
    """True for the held-out prompts of a bank, by their places in its corpus."""
    plan = bank.plan
    lengths = np.diff(plan.prompt_starts)
    positions = np.arange(len(plan.tokens)) - np.repeat(plan.prompt_starts[:-1], lengths)
    hashes = keyed_hash(np.asarray(plan.tokens, np.int64), positions)
    sums = np.append(np.uint64(0), np.cumsum(hashes, dtype=np.uint64))  # They wrap around, and so do their differences.
    of_prompts = sums[plan.prompt_starts[1:]] - sums[plan.prompt_starts[:-1]]
    return keyed_hash(of_prompts, np.zeros_like(lengths)) % np.uint64(HELD_OUT_EVERY) == 0
