import numpy as np
import pytest

import tl_latentlens as tll
from tl_latentlens.corpus.words import find_position, letters_of, positions_ending_word, positions_of_word, starts_word


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


@pytest.mark.parametrize(
    ("tokens", "word", "expected"),
    [
        (["", "The", " ban", "k", " Bank", "."], "bank", [3, 4]),
        (["", "The", " ban", "k", "."], "BANK", [3]),
        (["", "The", " ban", "k", "."], "the", [1]),
        (["", "The", " ban", "k", "."], "Ban", [2]),
        (["", "The", " ban", "k", "."], "an", []),
        (["", "the ", "ban", "k ", "bank "], "bank", [3, 4]),
        (["", ' "', "bank", '"', "?"], "bank", [2]),
        (["", "He", " can", "'t"], "can't", [3]),
        (["", "去", "银", "行", "存钱"], "银行", [3]),
        (["", " Stra", "ße"], "STRASSE", []),
        (["", " École", " of"], "école", [1]),
        (["", " New", " York", " is"], "new york", [2]),
    ],
)
def test_words_are_found_in_any_case(tokens: list[str], word: str, expected: list[int]) -> None:
    assert positions_ending_word(tokens, word) == expected


def test_words_that_are_none() -> None:
    for word in ("", "  "):
        with pytest.raises(tll.InvalidInputError, match="expected one with a letter or a sign"):
            positions_ending_word(["a"], word)
    with pytest.raises(tll.InvalidInputError, match=r"word 0 has a lone surrogate, .* at character 1"):
        positions_ending_word(["a"], "a\ud83d")


def test_special_tokens_are_no_part_of_a_word() -> None:
    tokens, special = ["[CLS]", "bank", "[SEP]"], np.array([True, False, True])
    assert find_position("Bank", tokens, special) == 1
    with pytest.raises(tll.InvalidInputError, match="no token of the text ends the word 'CLS'; the text is 'bank'"):
        find_position("CLS", tokens, special)


def test_words_start_where_letters_meet_something_else() -> None:
    tokens = ["", "The", " ban", "k", ",", "er", " 3", "rd"]
    assert [starts_word(tokens, pos) for pos in range(len(tokens))] == [True, True, True, False, True, True, True, False]


def test_letters_of() -> None:
    assert letters_of(" Don't 3!") == "dont"
