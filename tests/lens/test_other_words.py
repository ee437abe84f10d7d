"""The nearest other words of the tokens of a run."""

from typing import Any

import numpy as np
import pytest
import torch

import tl_latentlens as tll
from tl_latentlens.corpus.words import words_of_tokens

NAMES = ["blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.4.hook_resid_post"]
TEXT = "The boatman's boat, number 12, lay on the banks"


@pytest.fixture(scope="module")
def index(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    texts = ["The boats lay on the bank.", "Boating on the river near the banks", *tll.load_corpus("demo", limit=40)]
    path = tmp_path_factory.mktemp("words") / "words.h5"
    return tll.ContextualIndex(tll.build_bank(any_model, texts, path, hook_names=NAMES, progress=False), device="cpu")


@pytest.fixture(scope="module")
def result(any_model: Any, index: tll.ContextualIndex) -> tll.LensResult:
    hooks = tll.latentlens_hooks(index, top_k=3, words=7, calibrate=True)
    any_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    return hooks.result


def test_words_of_tokens() -> None:
    tokens = ["", "The", " boat", "man", "'s", " boat", ",", " 12", " b", "an", "ks", "!"]
    words = ["", "The", " boatman", " boatman", "'s", " boat", "", " 12", " banks", " banks", " banks", ""]
    assert words_of_tokens(tokens, [token.encode() for token in tokens]) == words
    assert words_of_tokens([], []) == []
    parts = [b" caf", b"\xc3", b"\xa9", b"s!"]
    assert words_of_tokens([part.decode("utf-8", "replace") for part in parts], parts) == [" cafés!"] * 4


def test_words_are_those_of_a_search_at_the_token_s_layer(
    any_model: Any, index: tll.ContextualIndex, result: tll.LensResult
) -> None:
    _, cache = any_model.run_with_cache(TEXT, names_filter=NAMES)
    n_read = 0
    for cell in result.cells():
        whole = words_of_tokens(result.text_tokens[0], [token.encode() for token in result.text_tokens[0]])[cell.pos]
        if cell.hook_name == NAMES[0] or not any(sign.isalpha() for sign in whole):
            assert cell.words == []
            continue
        vector = cache[cell.hook_name][0, cell.pos]
        found = index.search_words(vector, 7, query_hook_name=cell.hook_name, unlike=whole, calibrate=True)
        assert [near.word for near in cell.words] == [near.word for near in found.words_of(0)]
        assert {near.neighbor.hook_name for near in cell.words} == {cell.hook_name}
        assert all(near.chance is not None for near in cell.words)
        n_read += 1
    assert n_read == 2 * (len(result.positions) - 4)  # two commas and 12, which the vocabulary splits


def test_inflections_of_the_own_word_are_left_out(result: tll.LensResult) -> None:
    last = {near.word for near in result.cell(4, -1).words}
    assert last
    assert not last & {"bank", "banks"}


def test_tables_and_data_have_them(result: tll.LensResult) -> None:
    table = result.to_dataframe()
    of_last = table[(table["hook_name"] == NAMES[2]) & (table["pos"] == table["pos"].max())]
    words = ", ".join(near.word for near in result.cell(4, -1).words)
    assert of_last["words"].tolist() == [words, *[np.nan] * 2] or of_last["words"].fillna("").tolist() == [words, "", ""]
    assert "other words" in str(result)
    assert result.cell(4, -1).words[0].word in str(result)


def test_without_them(any_model: Any, index: tll.ContextualIndex) -> None:
    hooks = tll.latentlens_hooks(index, NAMES[1], words=0)
    any_model.run_with_hooks(TEXT, fwd_hooks=hooks)
    cell, grid = hooks.result.cell(3, -1), hooks.result.grid(0)
    assert (cell.words, cell.around, grid.words, grid.around) == (None,) * 4
    assert "words" not in hooks.result.to_dataframe()
    assert "other words" not in str(hooks.result)
    with pytest.raises(tll.InvalidInputError, match="got words=-1; expected how many words, 0 for none"):
        tll.latentlens_hooks(index, words=-1)


def test_a_run_on_embeddings_leaves_no_word_out(any_model: Any, index: tll.ContextualIndex) -> None:
    embeddings = any_model.W_E[any_model.to_tokens(TEXT)]
    hook = tll.LatentLensHook(index, positions=[-1], logit_lens=False, words=4)
    activation = torch.nn.functional.normalize(embeddings, dim=-1)
    hook(activation, hook=type("Point", (), {"name": NAMES[0]})())
    cell = hook.result.cell(NAMES[0], -1)
    expected = index.search_words(activation[0, -1], 4, query_hook_name=NAMES[0]).words_of(0)
    assert [near.word for near in cell.words] == [near.word for near in expected]
