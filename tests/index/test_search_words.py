"""The nearest words of vectors against a brute force over all rows."""

from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snowballstemmer
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.vectors import quick, unit

import tl_latentlens as tll
from tl_latentlens.corpus.words import letters_of, starts_word
from tl_latentlens.index.found_rows import FoundRows
from tl_latentlens.index.grouped import nearest_of_groups
from tl_latentlens.index.words import word_at_row

NAMES = ["blocks.2.hook_resid_post", "blocks.4.hook_resid_post"]
TEXTS = [
    "The boats lay on the river bank.",
    "She works at a bank, and he banks with another; banking is her life.",
    "An antidisestablishmentarian sat near the river 1234567 times",
    "Boat, boats and boating: it's 3rd!",
    "He didn't eat the résumé at the café, and I'll say naïve Straße.",
    "the the the the the the the the the the the the",
]


@pytest.fixture(scope="module", params=["raw", "center", "csls"])
def index(request: pytest.FixtureRequest, any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.ContextualIndex:
    """Two banks, whose words are counted together."""
    folder = tmp_path_factory.mktemp("words")
    parts = {"a": TEXTS, "b": [*TEXTS[:1], *tll.load_corpus("demo", limit=40)]}
    banks = [
        tll.build_bank(any_model, texts, folder / f"{name}.h5", hook_names=NAMES, max_rows_per_token=None, progress=False)
        for name, texts in parts.items()
    ]
    return tll.ContextualIndex(banks, device="cpu", transform=request.param)


@pytest.fixture(scope="module")
def row_words(index: tll.ContextualIndex) -> list[str]:
    """The word that each row ends, told row by row; empty for none."""
    words = []
    for row in range(index.n_rows):
        found = word_at_row(index.row(row))
        has_digit = any(sign.isdigit() for sign in index.row(row).token)
        position, tokens = index.row(row).position, index.row(row).prompt_tokens
        is_contracted = tokens[position + 1 : position + 2] in (["'t"], ["'ll"])
        goes_on = position + 1 < len(tokens) and not starts_word(tokens, position + 1)
        has_word = not goes_on and len(found.word) >= 3 and not has_digit and not is_contracted
        words.append(found.word if has_word else "")
    return words


@cache
def stem(word: str) -> str:
    return snowballstemmer.stemmer("english").stemWord(letters_of(word))


def brute(
    index: tll.ContextualIndex, row_words: list[str], query: torch.Tensor, names: list[str], unlike: str | None
) -> list[tuple[str, float]]:
    """Stem and similarity of every word, nearest first: one search of all rows, of which the first of each stem is kept."""
    everything = index.search(query, index.n_rows * len(names), names)
    nearest: dict[str, float] = {}
    for row, similarity in zip(everything.rows.tolist(), everything.similarities.tolist(), strict=True):
        word = row_words[row]
        if word and stem(word) != stem(unlike or ""):
            nearest.setdefault(stem(word), similarity)
    return list(nearest.items())


@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
@pytest.mark.parametrize("top_k", [1, 8, 10_000])
def test_words_are_those_of_a_brute_force(
    index: tll.ContextualIndex, row_words: list[str], names: list[str], top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tl_latentlens.index.nearest_words._FIRST_DEPTH", 5)  # so that most searches must go deeper
    monkeypatch.setattr("tl_latentlens.index.grouped._MAX_NUMBERS", 12)
    queries = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(1))
    unlike = ["Banks", None, " boat", "the", "zebra", "!"]
    found = index.search_words(queries, top_k, names, unlike=unlike)
    assert found.rows.shape[:2] == (2, 3)
    assert found.rows.shape[2] <= top_k
    for i, (query, word, words) in enumerate(zip(queries.view(-1, 256), unlike, chain(*found.words()), strict=True)):
        expected = brute(index, row_words, query, names, word)[:top_k]
        assert [(stem(near.word), near.similarity) for near in words] == expected, i
        assert [near.neighbor.similarity for near in words] == [near.similarity for near in words]
        assert all(letters_of(near.word) == row_words[near.neighbor.row] for near in words)


def test_an_activation_is_searched_at_its_own_layer(index: tll.ContextualIndex) -> None:
    vectors = torch.from_numpy(index.bank_rows.activations(NAMES[0], np.arange(6)))
    own = index.search_words(vectors, 5, query_hook_name=2)
    assert set(own.hook_ids.unique().tolist()) == {0}
    narrowed = index.search_words(vectors, 5, NAMES[0], NAMES[0])
    assert torch.equal(own.rows, narrowed.rows)
    both = index.search_words(torch.randn(4, 256, generator=torch.Generator().manual_seed(2)), 50, NAMES, NAMES[0])
    assert set(both.hook_ids[both.rows >= 0].unique().tolist()) == {0, 1}


def test_one_word_that_fills_the_bank_does_not_hide_the_others(any_model: Any, tmp_path: Path) -> None:
    texts = [f"{'dog ' * n}dogs" for n in range(1, 60)] + ["a cat slept"]
    bank = tll.build_bank(any_model, texts, tmp_path / "dogs.h5", max_rows_per_token=None, progress=False)
    index = tll.ContextualIndex(bank, bank.hook_names[2], device="cpu")
    query = bank.activations(bank.hook_names[2], np.array([3]))[0]
    assert index.search_words(query, 3).words_of(0)[0].word in ("dog", "dogs")
    assert {near.word for near in index.search_words(query, 3, unlike="dog").words_of(0)} == {"cat", "slept"}
    assert index.search_words(query, 3, unlike="dog", language=None).words_of(0)[0].word == "dogs"


def test_letters_of_several_tokens_and_contractions(index: tll.ContextualIndex) -> None:
    found = {near.word for near in index.search_words(torch.ones(256), 10**6).words_of(0)}
    assert {"résumé", "café", "naïve", "straße"} <= found
    assert not found & {"sum", "caf", "stra", "didn", "don"}


def test_each_word_of_several_is_left_out(index: tll.ContextualIndex) -> None:
    query = torch.ones(256)
    everything = {stem(near.word) for near in index.search_words(query, 10**6).words_of(0)}
    for unlike in ("river bank", "river-bank", "the river / banks"):
        found = {stem(near.word) for near in index.search_words(query, 10**6, unlike=unlike).words_of(0)}
        assert everything - found >= {"river", "bank"}


def test_no_word_at_all(any_model: Any, tmp_path: Path) -> None:
    bank = tll.build_bank(any_model, ["1 2 3, 4 5!", "?!"], tmp_path / "none.h5", progress=False)
    index = tll.ContextualIndex(bank, device="cpu")
    found = index.search_words(torch.ones(2, 256), 4, calibrate=True)
    assert found.words() == [[], []]
    assert (found.rows == -1).all()
    assert found.similarities.isnan().all()
    assert found.to_dataframe().empty
    assert index.search_words(torch.ones(0, 256), 4).rows.shape == (0, 1)


def test_chances_and_the_table(index: tll.ContextualIndex) -> None:
    query = torch.randn(256, generator=torch.Generator().manual_seed(3))
    found = index.search_words(query, 6, calibrate=True)
    words = found.words_of(0)
    everything = index.search(query, index.n_rows * len(NAMES), calibrate=True)
    chance_of = {}
    for row, hook_id, chance in zip(everything.rows, everything.hook_ids, everything.chances, strict=True):
        chance_of.setdefault((int(row), index.hook_names[int(hook_id)]), float(chance))
    assert [near.chance for near in words] == [chance_of[near.neighbor.row, near.neighbor.hook_name] for near in words]
    table = found.to_dataframe()
    assert table["word"].tolist() == [near.word for near in words]
    assert table["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert found.words() == words


def test_what_cannot_be_is_refused(index: tll.ContextualIndex) -> None:
    with pytest.raises(tll.InvalidInputError, match=r"got 2 words; expected one word, or a list"):
        index.search_words(torch.ones(3, 256), unlike=["bank", None])
    with pytest.raises(tll.InvalidInputError, match="got 5; expected one word, or a list"):
        index.search_words(torch.ones(256), unlike=5)
    with pytest.raises(tll.InvalidInputError, match="got language='elvish'; expected None, or one that has a stemmer: arabic"):
        index.search_words(torch.ones(256), language="elvish")
    for top_k in (0, 2.5, "3", None):
        with pytest.raises(tll.InvalidInputError, match=r"got top_k=.* expected at least 1, a whole number"):
            index.search_words(torch.ones(256), top_k)


@quick
@given(seed=st.integers(0, 10**6), n_words=st.integers(1, 5), depth=st.integers(1, 9), top_k=st.integers(1, 7))
def test_first_of_each_stem(seed: int, n_words: int, depth: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(unit(rng.standard_normal((4, 30)))).float()
    stems = torch.from_numpy(rng.integers(-1, n_words, 30))
    unlike = torch.from_numpy(rng.integers(-2, n_words, (4, 2)))

    def search(places: torch.Tensor, k: int) -> FoundRows:
        best = scores[places].sort(dim=-1, descending=True, stable=True)
        return FoundRows(best.values[:, :k], best.indices[:, :k], torch.zeros_like(best.indices[:, :k]))

    found = nearest_of_groups(search, 4, 30, top_k, lambda rows: stems[rows], unlike, (depth, 8))
    for i in range(4):
        expected: dict[int, int] = {}
        for row in scores[i].argsort(descending=True, stable=True).tolist():
            if int(stems[row]) not in (-1, *unlike[i].tolist()):
                expected.setdefault(int(stems[row]), row)
        rows = list(expected.values())[:top_k]
        assert found.rows[i].tolist() == rows + [-1] * (top_k - len(rows))
