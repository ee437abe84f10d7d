"""The p of a component among all: uniform where there is nothing to find, and equal to one computed here."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import tl_latentlens as tll
from tl_latentlens.directions.features.sae import TensorSAE
from tl_latentlens.directions.find.component_ranking import Contributions, rank_components
from tl_latentlens.directions.find.component_runs import run_components
from tl_latentlens.directions.find.other_meanings import other_meanings, unlike_the_word

HOOK = "blocks.3.hook_resid_post"
AT_BANK = "We fished in the river and sat on the grassy bank"
FEW_USES = "They crossed the old stone bridge"


@pytest.fixture(scope="module")
def word_index(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    texts = [text for text in tll.load_corpus("demo") if " bank" in text] + list(tll.load_corpus("demo", limit=250))
    path = tmp_path_factory.mktemp("family") / "bank.h5"
    return tll.ContextualIndex(tll.build_bank(any_model, texts, path, hook_names=HOOK, progress=False), device="cpu")


@pytest.mark.parametrize("n_uses", [6, 12, 18, 40])
@pytest.mark.parametrize("n_components", [3, 100])
def test_first_components_beat_their_null_by_chance_as_often_as_they_may(n_components: int, n_uses: int) -> None:
    """The word is one more use, and its meaning one more meaning: of any number of uses and components."""
    rng, beats, is_first_p = np.random.default_rng(n_uses), [], []
    for _ in range(400):
        scales = rng.exponential(size=n_components)
        word, *uses = rng.standard_normal((1 + n_uses, n_components)) * scales
        excess_along_others = rng.standard_normal((99, n_components)) * scales - np.mean(uses, axis=0)
        random = rng.standard_normal((60, n_components)) * scales
        contributions = Contributions(word, np.array(uses), random, excess_along_others.max(1))
        first = rank_components(contributions, SimpleNamespace(has_contrast=True), 1.0, 1).table.iloc[0]  # pyright: ignore
        beats.append(first["beats_null"])
        is_first_p.append(first["p_family"] <= 0.05)
    assert np.mean(beats) <= np.mean(is_first_p)
    assert 0.02 < np.mean(is_first_p) < 0.09


def test_feature_p_among_all_is_that_of_every_meaning_in_turn(any_model: Any, word_index: Any) -> None:
    decoder = normalize(torch.randn(60, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    sae = TensorSAE(decoder, {"W_enc": decoder.T.clone(), "b_enc": torch.zeros(60)}, hook_name=HOOK)
    table = tll.find_features(AT_BANK, "bank", sae, word_index, model=any_model, top_k=60, label=False).table
    runs = run_components(AT_BANK, "bank", word_index, any_model, HOOK, 0)
    word, bank = runs.word, word_index.banks[0]
    uses = torch.from_numpy(bank.activations(HOOK, word.contrast_rows))
    excess = sae.encode(word.activation) - sae.encode(uses).mean(0)
    active = sae.encode(word.activation) != 0
    assert len(runs.others) > 40
    largest = []
    for meaning in runs.others:
        if abs(float(meaning @ word.direction)) > 0.5:
            continue
        sign = 1 if float((word.activation - uses.mean(0)) @ meaning) > 0 else -1
        largest.append(float((sign * excess * (decoder @ meaning))[active].max()))
    for line in table.to_dict("records"):
        own = float(excess[line["feature"]] * (decoder[line["feature"]] @ word.direction))
        at_least = sum(other >= own for other in largest)
        assert line["n_family"] == len(largest)
        assert abs(line["p_family"] * (1 + len(largest)) - 1 - at_least) < 1.5  # one, where two are equal but for rounding
    assert not table["beats_null"][table["p_family"] > 0.05].any()


@pytest.mark.parametrize("text", [AT_BANK, FEW_USES])
def test_head_and_neuron_p_among_all_are_those_of_every_meaning_in_turn(any_model: Any, word_index: Any, text: str) -> None:
    runs = run_components(text, -1, word_index, any_model, HOOK, 0)
    assert runs.word.has_contrast == (text == AT_BANK)
    meanings = unlike_the_word(runs.others, runs.word)
    projections = [runs.weights.heads(runs.outputs, meaning).flatten(1) for meaning in meanings]
    by_hand = [float((one[0] - one[runs.usual_places].mean(0)).max()) for one in projections]
    found = runs.weights.largest_of_heads(runs.excess(runs.outputs.z), meanings)
    np.testing.assert_allclose(found, by_hand, rtol=1e-3, atol=1e-3)
    projections = [runs.weights.neurons(runs.outputs, meaning).flatten(1) for meaning in meanings[:20]]
    by_hand = [float((one[0] - one[runs.usual_places].mean(0)).max()) for one in projections]
    found = runs.weights.largest_of_neurons(runs.excess(runs.outputs.post), meanings[:20])
    np.testing.assert_allclose(found, by_hand, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("text", [AT_BANK, FEW_USES])
def test_other_meanings_are_of_other_words_and_the_word_has_more_of_each(any_model: Any, word_index: Any, text: str) -> None:
    word = run_components(text, -1, word_index, any_model, HOOK, 0).word
    others = other_meanings(word, word_index, 0)
    assert 19 < len(others) <= 199
    torch.testing.assert_close(others.norm(dim=-1), torch.ones(len(others)))
    torch.testing.assert_close(other_meanings(word, word_index, 0), others)
    with_own = torch.cat([others, word.direction[None], -word.direction[None]])
    compared = unlike_the_word(with_own, word)
    assert float((compared @ word.direction).abs().max()) <= 0.5
    assert float((compared @ (word.activation - word.usual)).min()) >= 0


def test_a_bank_of_few_words_cannot_tell(any_model: Any, tmp_path: Any) -> None:
    texts = [f"{start} the bank" for start in ("Near", "At", "By", "From", "To", "On", "Over", "Past", "Behind", "Off")]
    bank = tll.build_bank(any_model, texts, tmp_path / "few.h5", hook_names=HOOK, progress=False)
    table = tll.find_heads("Inside the bank", "bank", tll.ContextualIndex(bank, device="cpu"), model=any_model).table
    assert (table["n_family"] < 19).all()
    assert not table["beats_null"].any()
    reasons = set(table["why_not"][table["p_same_token"] <= 0.2])
    assert any("other words to compare with, of 19 at least" in reason for reason in reasons)


def test_the_table_says_what_a_component_fails_of(any_model: Any, word_index: Any) -> None:
    table = tll.find_heads(AT_BANK, "bank", word_index, model=any_model, top_k=100).table
    assert (table["beats_null"] == (table["why_not"] == "")).all()
    by_family = table["why_not"].str.startswith("adds no more than some component does along other words' meanings (p = ")
    assert by_family.any()
    assert (table["p_family"][by_family] > 0.05).all()
    assert (table["p_family"][table["beats_null"]] <= 0.05).all()
