"""Substitution against a hook written here."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from support.evaluation import NAMES, neighbors_at_all

import tl_latentlens as tll
from tl_latentlens.evaluation.held_out import (
    draw_held_out_rows,
)
from tl_latentlens.evaluation.labelled_uses import find_uses
from tl_latentlens.evaluation.substitution import prediction_shift, substitution
from tl_latentlens.model.activations import activations_at


def test_substitution_by_hand(demo_model: Any, bank: tll.Bank) -> None:
    """A token's own row moves nothing (but by float16); another moves what a hook written here moves."""
    held_out = draw_held_out_rows(bank, 12, 1)
    other = np.random.default_rng(0).integers(0, bank.n_rows, 12)
    rows = np.ma.stack([np.ma.array(held_out.rows), np.ma.array(other), np.ma.array(other, mask=True)], 1)
    shift = prediction_shift(demo_model, held_out, NAMES[0], rows)
    for kl in (shift.at_token, shift.later):
        assert np.nanmax(kl[:, 0]) < 1e-3
        assert np.isnan(kl[:, 2]).all()
    for i, (cell, row) in enumerate(zip(held_out.rows.tolist(), other.tolist(), strict=True)):
        found = bank.row(cell)
        tokens, at = torch.tensor([bank.prompt(found.prompt_index)]), found.position
        vector = torch.from_numpy(bank.activations(NAMES[0], np.array([row]))[0])

        def put(activation: torch.Tensor, hook: Any, at: int = at, vector: torch.Tensor = vector) -> torch.Tensor:
            changed = activation.clone()
            changed[0, at] = vector
            return changed

        with torch.no_grad():
            before = demo_model(tokens).log_softmax(-1)[0]
            after = demo_model.run_with_hooks(tokens, fwd_hooks=[(NAMES[0], put)]).log_softmax(-1)[0]
        kl = (before.exp() * (before - after)).sum(-1)
        expected = [float(kl[at]), float(kl[at + 1 : at + 5].mean())]
        np.testing.assert_allclose([shift.at_token[i, 1], shift.later[i, 1]], expected, rtol=1e-3, atol=1e-4)


def test_substitution_ranks_neighbors_before_nulls(any_model: Any, bank: tll.Bank) -> None:
    indexes = [tll.ContextualIndex(bank, device="cpu", transform=one) for one in ("raw", "center")]
    held_out = draw_held_out_rows(bank, 30, 2)
    measures = substitution(any_model, held_out, neighbors_at_all(indexes, held_out, 5), progress=False)
    assert [measure.name for measure in measures] == [
        "KL of neighbor 1 (nats)", "KL of neighbor 5 (nats)", "KL of neighbor 1 on later tokens (nats)",
    ]  # fmt: skip
    means = {key: np.nanmean(values) for key, values in measures[0].values.items()}
    for name in NAMES:
        assert means["raw", name] < means["same token", name] < means["random", name]
        assert means["raw", name] < np.nanmean(measures[1].values["raw", name])
    assert {reader for reader, _ in means} == {"raw", "center", "same token", "random", "embedding"}


def test_no_embedding_is_near_to_what_is_outside_the_residual_stream(any_model: Any, tmp_path: Path) -> None:
    texts, name = list(tll.load_corpus("demo", limit=40)), "blocks.3.attn.hook_z"  # as wide as the stream
    bank = tll.build_bank(any_model, texts, tmp_path / "z.h5", hook_names=name, progress=False)
    held_out = draw_held_out_rows(bank, 8, 0)
    index = tll.ContextualIndex(bank, device="cpu")
    measure = substitution(any_model, held_out, neighbors_at_all([index], held_out, 5), progress=False)[0]
    assert set(measure.values) == {("raw", name), ("same token", name), ("random", name)}


def test_a_repeat_bank_is_evaluated_on_second_copies(any_model: Any, senses: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "twice.h5"
    bank = tll.build_bank(any_model, list(senses.text), path, hook_names=NAMES[0], repeat=True, progress=False)
    uses = find_uses(any_model, senses, bank.plan.settings)
    found = activations_at(any_model, uses.prompts, uses.positions, [NAMES[0]])[NAMES[0]]
    index = tll.ContextualIndex(bank, device="cpu")
    nearest = index.search(found[:20], 1)
    assert float(nearest.similarities.min()) > 0.999
    held_out = draw_held_out_rows(bank, 10, 0)
    shift = prediction_shift(any_model, held_out, NAMES[0], np.ma.array(held_out.rows[:, None]))
    assert np.nanmax([shift.at_token, shift.later]) < 1e-3
