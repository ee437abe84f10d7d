"""In a grid of sentences the cells do not repeat the tokens below them."""

from typing import Any

import pytest
import snowballstemmer

import tl_latentlens as tll
from tl_latentlens.corpus.words import letters_of, words_of_tokens

SENTENCES = [
    "She deposited her money and her savings at the bank",
    "We fished in the river and sat on the grassy bank",
    "The judge walked into the court and asked for silence.",
    "He lit a match in the dark cave and saw a bat.",
    "The pitcher threw the ball and the bats broke.",
    "My sister plays the violin in an orchestra in Vienna.",
    "The price of oil rose by three percent on Monday.",
    "Why did the chicken cross the road?",
    "A seal slept on the warm rocks near the harbor.",
    "The worn rubber seal of the door let the rain in.",
]


@pytest.fixture(scope="module")
def result(any_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tll.LensResult:
    texts = [*SENTENCES[:5], *tll.load_corpus("demo", limit=150)]
    bank = tll.build_bank(any_model, texts, tmp_path_factory.mktemp("own") / "b.h5", hook_names="all", progress=False)
    hooks = tll.latentlens_hooks(tll.ContextualIndex(bank, device="cpu"))
    any_model.run_with_hooks(SENTENCES, fwd_hooks=hooks)
    return hooks.result


def shares_of_own_words(result: tll.LensResult, lens: str) -> float:
    """The share of cells whose first word is the input token's own, in any case and inflection."""
    stem, is_own = snowballstemmer.stemmer("english").stemWord, []
    for batch, tokens in enumerate(result.text_tokens):
        grid = result.grid(batch)
        own = words_of_tokens(tokens, [token.encode() for token in tokens])
        for i, line in enumerate(grid.rows[..., 0].tolist()):
            words = grid.row_words(grid.rows[i, :, 0])
            shown = [words[row] for row in line] if lens == "latentlens" else grid.first_tokens(lens)[i]
            is_own += [
                bool(own[pos]) and stem(letters_of(word)) == stem(letters_of(own[pos]))
                for word, pos in zip(shown, grid.positions, strict=True)
            ]
    return sum(is_own) / len(is_own)


def test_at_most_one_cell_in_ten_shows_the_token_s_own_word(result: tll.LensResult) -> None:
    assert shares_of_own_words(result, "latentlens") > 0.5, "uses do, also where the bank holds the sentences"
    assert shares_of_own_words(result, "words") == 0
    assert shares_of_own_words(result, "around") == 0


def test_no_list_shows_one_row_twice(result: tll.LensResult) -> None:
    for batch in range(len(SENTENCES)):
        rows = result.grid(batch).rows
        assert all(len(set(of_cell)) == len(of_cell) for line in rows.tolist() for of_cell in line)
