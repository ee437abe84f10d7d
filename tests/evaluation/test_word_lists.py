"""Sense accuracy of lists of other words, against votes counted by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.evaluation import NAMES

import tl_latentlens as tll
from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.evaluation.labelled_uses import Uses, find_uses
from tl_latentlens.evaluation.senses import activations_of_uses, sense_accuracy, votes_of_baselines
from tl_latentlens.evaluation.word_lists import shared_words, votes_of_words
from tl_latentlens.statistics.measures import ReaderKey


def test_shared_words_are_counted_over_the_lengths_of_the_lists() -> None:
    ids = np.array([[4, 9, 7, 1], [9, 4, -1, -1], [-1, -1, -1, -1], [3, -1, 4, -1], [1, 4, 7, 9]])
    shared = shared_words(ids)
    lists = [set(line[line >= 0].tolist()) for line in ids]
    by_hand = [[len(a & b) / np.sqrt(max(1, len(a)) * max(1, len(b))) for b in lists] for a in lists]
    np.testing.assert_allclose(shared, by_hand)
    assert shared_words(np.full((3, 0), -1)).tolist() == [[0] * 3] * 3
    assert shared_words(np.full((2, 5), -1)).tolist() == [[0] * 2] * 2


def answers_by_hand(uses: Uses, lists: list[set[Any]], top_k: int) -> dict[int, list[bool]]:
    """Sense → whether each question of it is answered right by the uses that share most with it."""
    right: dict[int, list[bool]] = {}
    for i in np.flatnonzero(uses.held_out):
        known = np.flatnonzero((uses.words == uses.words[i]) & ~uses.held_out)
        shares = np.array([len(lists[i] & lists[j]) / np.sqrt(max(1, len(lists[i]) * len(lists[j]))) for j in known])
        ranked = np.sort(shares)[::-1]
        voters = (shares >= ranked[top_k - 1] - 1e-9) & (shares > 0)
        weights = np.where(voters, np.maximum(shares - ranked[min(top_k, len(ranked) - 1)], 0) + 1e-6, 0)
        votes = {sense: weights[uses.senses[known] == sense].sum() for sense in sorted(set(uses.senses[known]))}
        answer = max(votes, key=lambda sense: votes[sense])
        right.setdefault(uses.senses[i], []).append(bool(voters.any()) and answer == uses.senses[i])
    return right


@pytest.fixture(scope="module")
def senses_bank(any_model: Any, tmp_path_factory: pytest.TempPathFactory, senses: pd.DataFrame) -> tll.Bank:
    """A bank of most of the labelled uses, and of other texts."""
    texts = [*senses["text"][::2], *tll.load_corpus("demo", limit=40)]
    folder = tmp_path_factory.mktemp("words")
    names = ["blocks.0.hook_resid_post", *NAMES[1:]]
    return tll.build_bank(any_model, texts, folder / "b.h5", hook_names=names, progress=False)


@pytest.mark.parametrize("transform", ["auto", "center"])
def test_other_words_vote_by_the_words_that_uses_share(
    any_model: Any, senses_bank: tll.Bank, senses: pd.DataFrame, transform: str
) -> None:
    uses = find_uses(any_model, senses, PlanSettings())
    index = tll.ContextualIndex(senses_bank, device="cpu", transform=transform)
    activations = activations_of_uses(any_model, uses, index.hook_names)
    votes = votes_of_words(index, uses, activations, 5)
    assert {name for reader, name in votes if reader == "other words"} == set(NAMES[1:]), "the first layers have no words"
    assert {reader for reader, _ in votes} == {"other words", "around"}
    measure = sense_accuracy(uses, votes)
    texts = senses["text"].tolist()
    for name in NAMES[1:]:
        found = index.search_words(activations[name], 40, query_hook_name=name, unlike=senses["word"].tolist())
        lists = []
        for i, text in enumerate(texts):
            stems = [
                int(found.table.stem_ids[near.neighbor.row])
                for near in found.words_of(i)
                if index.row(near.neighbor.row).prompt_text != text
            ]
            lists.append(set(stems[:20]))
        by_hand = answers_by_hand(uses, lists, 5)
        np.testing.assert_allclose(
            measure.values[ReaderKey("other words", name)], [np.mean(by_hand[s]) for s in sorted(by_hand)]
        )
        around = list(map(set, index.words_around(activations[name], name, senses["word"].tolist())))
        by_hand = answers_by_hand(uses, around, 5)
        np.testing.assert_allclose(measure.values[ReaderKey("around", name)], [np.mean(by_hand[s]) for s in sorted(by_hand)])


def test_the_other_lenses_are_compared_by_as_many_tokens_in_the_same_way(any_model: Any, senses: pd.DataFrame) -> None:
    uses = find_uses(any_model, senses, PlanSettings())
    activations = activations_of_uses(any_model, uses, (NAMES[1],))
    measure = sense_accuracy(uses, votes_of_baselines(any_model, uses, activations, 5))
    for reader, lens in (("logit lens", tll.logit_lens), ("embedding lens", tll.embedding_lens)):
        tokens = lens(any_model, activations[NAMES[1]], 20).token_ids.tolist()
        by_hand = answers_by_hand(uses, list(map(set, tokens)), 5)
        np.testing.assert_allclose(measure.values[ReaderKey(reader, NAMES[1])], [np.mean(by_hand[s]) for s in sorted(by_hand)])


def test_words_of_the_own_text_do_not_count(any_model: Any, tmp_path: Path) -> None:
    """The held-out use's text is all that the bank has."""
    senses = tll.load_senses("demo")
    of_word = senses[senses["word"] == senses["word"].iloc[0]]
    bank = tll.build_bank(any_model, of_word["text"].tolist()[:1], tmp_path / "b.h5", hook_names=NAMES[1], progress=False)
    uses = find_uses(any_model, of_word.assign(held_out=[True] + [False] * (len(of_word) - 1)), PlanSettings())
    index = tll.ContextualIndex(bank, device="cpu")
    votes = votes_of_words(index, uses, activations_of_uses(any_model, uses, index.hook_names), 5)
    assert votes[ReaderKey("other words", NAMES[1])].tolist() == [None]


def test_evaluate_has_the_readers_and_says_in_which_geometry_labels_are(
    any_model: Any, bank: tll.Bank, senses: pd.DataFrame
) -> None:
    settings: dict[str, Any] = {"senses": senses, "n_tokens": 4, "top_k": 2, "progress": False}
    decoder = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    sae = tll.load_sae({"W_dec": decoder, "W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(6)}, hook_name=NAMES[1])
    index = tll.ContextualIndex(bank, NAMES[1], device="cpu")
    found = tll.evaluate(any_model, index, sae=sae, **settings)
    readers = found.to_dataframe().query("measure == 'sense accuracy'")["reader"].unique().tolist()
    assert readers[-2:] == ["other words", "around"]
    assert found.labels is not None
    assert found.labels["transform"].unique().tolist() == ["center"]
    assert "other words" in str(found)
    raw = tll.evaluate(any_model, index, sae=sae, transforms="raw", **settings)
    assert raw.labels is not None
    assert raw.labels["transform"].unique().tolist() == ["raw"]
