"""Reader agreement against shares counted by hand."""

from pathlib import Path
from typing import Any

import numpy as np
from support.evaluation import NAMES, neighbors_at_all, shares_context_by_hand

import tl_latentlens as tll
from tl_latentlens.evaluation.agreement import reader_agreement
from tl_latentlens.evaluation.held_out import (
    HeldOutRows,
    draw_held_out_rows,
    neighbors_in_other_prompts,
)


def test_neighbors_in_other_prompts_and_agreement_by_hand(bank: tll.Bank) -> None:
    index = tll.ContextualIndex(bank, device="cpu")
    held_out = draw_held_out_rows(bank, 25, 3)
    found = neighbors_in_other_prompts(index, held_out, NAMES[1], 4)
    rows = np.asarray(bank.vectors(NAMES[1])).astype(np.float64)
    shares = []
    for cell, neighbors in zip(held_out.rows.tolist(), found.tolist(), strict=True):
        order = [row for row in np.argsort(-(rows @ rows[cell])).tolist() if not shares_context_by_hand(bank, cell, row)]
        assert neighbors == order[:4]
        following = [bank.prompt(bank.row(row).prompt_index)[bank.row(row).position + 1 :][:1] for row in [cell, *neighbors]]
        shares.append(np.mean([after == following[0] for after in following[1:]]))
    agree = {
        measure.name: measure for measure in reader_agreement(held_out, neighbors_at_all([index], held_out, 4), progress=False)
    }
    np.testing.assert_allclose(agree["next token"].values["raw", NAMES[1]], shares)
    assert agree["next token"].values["raw", NAMES[1]].mean() > agree["next token"].values["random", None].mean()
    assert set(agree["topic"].values) == set(agree["next token"].values)
    assert 0 < np.nanmean(agree["topic"].values["raw", NAMES[1]]) < 1


def test_topic_is_a_telling_word_in_common(any_model: Any, tmp_path: Path) -> None:
    """ " bank" among 120 sentences of other things: what two of its uses share is told by the words around both."""
    wet = [
        "He rowed the zeppelin to the bank.",
        "She tied the zeppelin near the bank.",
        "They steered their zeppelin along that bank.",
    ]
    dry = ["He cashed a cheque at the bank.", "She took that cheque into a bank.", "They paid the cheque at some bank."]
    texts = [*wet, *dry, *tll.load_corpus("demo", limit=120)]
    bank = tll.build_bank(any_model, texts, tmp_path / "b.h5", hook_names=NAMES, max_rows_per_token=None, progress=False)
    uses = [row for row in range(bank.n_rows) if bank.row(row).token == " bank" and bank.row(row).prompt_index < 6]
    assert len(uses) == 6
    index = tll.ContextualIndex(bank, device="cpu")
    held_out = HeldOutRows(np.array(uses), bank)
    (_, topic) = reader_agreement(held_out, neighbors_at_all([index], held_out, 5), progress=False)
    for name in NAMES:
        found = neighbors_in_other_prompts(index, held_out, name, 5)
        prompts = bank.plan.row_prompts[found]
        tells = np.isin(bank.plan.tokens[bank.plan.row_tokens[found]], bank.plan.tokens[bank.plan.row_tokens[uses]])
        expected = [
            np.mean((row < 6) & (row // 3 == i // 3) & of_bank)
            for i, (row, of_bank) in enumerate(zip(prompts, tells, strict=True))
        ]
        assert max(expected) > 0
        np.testing.assert_allclose(topic.values["raw", name], expected)
