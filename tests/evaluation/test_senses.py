"""Sense accuracy against votes counted by hand, and against planted senses."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from support.evaluation import NAMES

import tl_latentlens as tll
from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.evaluation.labelled_uses import Uses, find_uses
from tl_latentlens.evaluation.senses import (
    activations_of_uses,
    most_frequent_sense,
    sense_accuracy,
    vote_of_nearest,
    votes_of_baselines,
    votes_of_index,
)
from tl_latentlens.statistics.intervals import mean_of
from tl_latentlens.statistics.measures import Measure


def senses_by_all(model: Any, uses: Uses, index: tll.ContextualIndex) -> Measure:
    activations = activations_of_uses(model, uses, index.hook_names)
    votes = votes_of_index(index, uses, activations, 5) | votes_of_baselines(model, uses, activations, 5)
    return sense_accuracy(uses, votes)


def test_sense_accuracy_is_a_vote_of_the_nearest_uses(any_model: Any, bank: tll.Bank, senses: pd.DataFrame) -> None:
    """By hand: run each text alone, rank by cosine, let five vote by what they are nearer than the sixth."""
    uses = find_uses(any_model, senses, PlanSettings())
    index = tll.ContextualIndex(bank, device="cpu")
    measure = senses_by_all(any_model, uses, index)
    vectors_of: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for prompt, position in zip(uses.prompts, uses.positions, strict=True):
        with torch.no_grad():
            _, cache = any_model.run_with_cache(torch.tensor([prompt]), names_filter=NAMES)
        for name in NAMES:
            vectors_of[name].append(cache[name][0, position].double().numpy())
    for name, vectors in vectors_of.items():
        units = np.stack(vectors) / np.linalg.norm(vectors, axis=-1, keepdims=True)
        right: dict[int, list[bool]] = {}
        for i in np.flatnonzero(uses.held_out):
            known = np.flatnonzero((uses.words == uses.words[i]) & ~uses.held_out)
            near = known[np.argsort(-units[known] @ units[i])][:6]
            cosines = units[near] @ units[i]
            votes = {s: sum((cosines - cosines[5])[:5][uses.senses[near[:5]] == s]) for s in set(uses.senses[near[:5]])}
            right.setdefault(uses.senses[i], []).append(max(votes, key=lambda s: votes[s]) == uses.senses[i])
        by_hand = [np.mean(right[sense]) for sense in sorted(right)]
        np.testing.assert_allclose(measure.values["raw", name], by_hand)
    readers = {reader for reader, _ in measure.values}
    assert readers == {"most frequent sense", "layer 0", "raw", "logit lens", "embedding lens"}


def test_context_tells_senses_and_layer_0_does_not(demo_model: Any, tmp_path: Path) -> None:
    """The embedded model on its held-out senses: contextual layers clearly above layer 0 and the most frequent sense."""
    bank = tll.build_bank(demo_model, tll.load_corpus("demo", limit=60), tmp_path / "b.h5", hook_names=NAMES, progress=False)
    table = tll.load_senses("demo")
    uses = find_uses(demo_model, table[table["word"].isin(table["word"].unique()[::2])].reset_index(drop=True), PlanSettings())
    measure = senses_by_all(demo_model, uses, tll.ContextualIndex(bank, device="cpu"))
    figures = {key: mean_of(values) for key, values in measure.values.items()}
    best = figures["raw", NAMES[1]]
    assert best.mean > 0.75
    assert best.low > max(figures["layer 0", None].high, figures["most frequent sense", None].high)
    assert best.mean > figures["logit lens", NAMES[1]].mean


def planted(held_out: list[int]) -> Uses:
    """One word; senses 0 0 0 1 1 1, of another word 2 2."""
    mask = np.zeros(8, bool)
    mask[held_out] = True
    words, senses = np.array([0] * 6 + [1] * 2), np.array([0, 0, 0, 1, 1, 1, 2, 2])
    return Uses([[1]] * 8, np.zeros(8, int), words, senses, mask)


def testvote_of_nearest() -> None:
    uses = planted([0, 3])
    line = np.array([0.0, 0.1, 0.2, 1.0, 0.9, 0.8, 0.0, 1.0])
    nearness = 1 - np.abs(line[:, None] - line)
    assert vote_of_nearest(uses, nearness, 2).tolist() == [0, 1]
    assert vote_of_nearest(uses, -nearness, 2).tolist() == [1, 0]
    assert vote_of_nearest(uses, np.zeros((8, 8)), 2).tolist() == [0, 0]  # all equally near: all vote
    assert vote_of_nearest(uses, np.zeros((8, 8)), 2, above=0).tolist() == [None, None]
    alone = planted([])
    assert vote_of_nearest(alone, nearness, 1).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert most_frequent_sense(uses).tolist() == [0, 0]
    assert most_frequent_sense(alone).tolist() == [0] * 6 + [2] * 2
    assert most_frequent_sense(planted([0, 1])).tolist() == [1, 1]
