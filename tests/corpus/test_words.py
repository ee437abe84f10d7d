import numpy as np
import pytest

import tl_latentlens as tll
from tl_latentlens.corpus.words import find_position, letters_of, positions_of_word, starts_word, word_ending_at


def test_positions_of_word() -> None:
    tokens = ["", "The", " bank", "er", " at", " the", ' "', "bank", '"', ".", " Ban", "k", "."]
    assert positions_of_word(tokens, "bank") == [7, 11]
    assert positions_of_word(tokens, "banker") == [3]
    assert positions_of_word(tokens, "river") == []


def test_find_position() -> None:
    tokens, special = ["<s>", " The", " ban", "k", " by", " the", " ban", "k", "."], np.array([True] + 8 * [False])
    assert find_position("bank", tokens, special) == 7
    assert find_position(" ban ", tokens, special) == 6
    assert find_position(3, tokens, special) == 3
    assert find_position(-1, tokens, special) == 8
    with pytest.raises(tll.InvalidInputError, match="no token of the text ends the word 'sea'"):
        find_position("sea", tokens, special)
    for wrong in (0, 9, -9, -10):
        with pytest.raises(tll.InvalidInputError, match=f"got position {wrong}, expected"):
            find_position(wrong, tokens, special)


def test_word_ending_at() -> None:
    tokens = ["<s>", "The", " ban", "k", "."]
    assert [word_ending_at(tokens, pos) for pos in range(1, 5)] == ["The", "ban", "bank", "bank."]


def test_words_start_where_letters_meet_something_else() -> None:
    tokens = ["", "The", " ban", "k", ",", "er", " 3", "rd"]
    assert [starts_word(tokens, pos) for pos in range(len(tokens))] == [True, True, True, False, True, True, True, False]


def test_letters_of() -> None:
    assert letters_of(" Don't 3!") == "dont"
