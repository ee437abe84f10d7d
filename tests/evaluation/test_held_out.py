"""Rows of other prompts: neighbors and random ones, against prompts compared one by one."""

from pathlib import Path
from typing import Any

import numpy as np
from support.evaluation import NAMES, shares_context_by_hand

import tl_latentlens as tll
from tl_latentlens.evaluation.held_out import (
    HeldOutRows,
    draw_held_out_rows,
    random_rows_in_other_prompts,
    shares_context,
)


def test_own_prompt_and_same_beginnings_are_left_out(any_model: Any, tmp_path: Path) -> None:
    texts = ["The river ran over its bank.", "The river ran over the bridge.", "The river froze.", "Money in the bank."]
    bank = tll.build_bank(any_model, texts, tmp_path / "b.h5", hook_names=NAMES[0], progress=False)
    held_out = HeldOutRows(np.arange(bank.n_rows), bank)
    every = np.tile(np.arange(bank.n_rows), (bank.n_rows, 1))
    expected = [[shares_context_by_hand(bank, cell, row) for row in range(bank.n_rows)] for cell in range(bank.n_rows)]
    np.testing.assert_array_equal(shares_context(held_out, every), expected)
    assert 0 < np.mean(expected) < 1


def test_random_rows_of_a_token(bank: tll.Bank) -> None:
    held_out = draw_held_out_rows(bank, 40, 0)
    rng = np.random.default_rng(0)
    rows = random_rows_in_other_prompts(held_out, 3, rng, held_out.token_ids)
    ids = bank.plan.tokens[bank.plan.row_tokens]
    for cell, drawn in zip(held_out.rows.tolist(), rows.tolist(), strict=True):
        for row in drawn:
            assert row is None or (ids[row] == ids[cell] and not shares_context_by_hand(bank, cell, row))
    having = np.bincount(ids)[ids[held_out.rows]] > 20
    assert not np.ma.getmaskarray(rows)[having].any()
    assert len(np.unique(random_rows_in_other_prompts(held_out, 3, rng))) > 100
