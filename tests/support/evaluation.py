"""Held-out rows read by each transform, and which rows share their context, found one by one."""

import numpy as np

import tl_latentlens as tll
from tl_latentlens.evaluation.held_out import (
    HeldOutRows,
    neighbors_in_other_prompts,
)
from tl_latentlens.statistics.measures import ReaderKey

NAMES = ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]


def neighbors_at_all(indexes: list[tll.ContextualIndex], held_out: HeldOutRows, k: int) -> dict[ReaderKey, np.ma.MaskedArray]:
    """Each transform's neighbors at each hook name."""
    return {
        ReaderKey(index.transform, name): neighbors_in_other_prompts(index, held_out, name, k)
        for index in indexes
        for name in index.hook_names
    }


def prefix(bank: tll.Bank, row: int) -> list[int]:
    found = bank.row(row)
    return bank.prompt(found.prompt_index)[: found.position + 1]


def shares_context_by_hand(bank: tll.Bank, cell: int, row: int) -> bool:
    mine, own = bank.row(row).prompt_index, bank.row(cell).prompt_index
    start = prefix(bank, cell)
    return mine == own or bank.prompt(mine)[: len(start)] == start
