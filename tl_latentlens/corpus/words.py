"""Words of tokens: where a word starts and ends among the tokens of a text. Says nothing about rows; `index.words` does."""

import operator
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Bool

from tl_latentlens.corpus.unicode import require_unicode
from tl_latentlens.errors import InvalidInputError

_PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # stands for it where a token is shown by itself


def positions_of_word(tokens: Sequence[str], word: str) -> list[int]:
    """The position of the last token of each occurrence of a whole word, in any case.

    Raises:
        InvalidInputError: A word without a letter or sign, or one that cannot be encoded.
    """
    require_unicode([word], name="word")
    if not word.strip():
        raise InvalidInputError(f"got the word {word!r}; expected one with a letter or a sign at least")
    ends = np.cumsum([len(token) for token in tokens])
    matches = re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", "".join(tokens), re.IGNORECASE)
    return [int(np.searchsorted(ends, match.end(), "left")) for match in matches]


def positions_ending_word(tokens: Sequence[str], word: str) -> list[int]:
    """The position of the last token of each occurrence of a word, in any case.

    Where it is no whole word of the text, its occurrences as one or more whole tokens: a part of a word, or a word of a script
    without spaces.

    Args:
        tokens: The text's tokens; empty for those that are no text.
        word: The word; spaces around it are left out.

    Raises:
        InvalidInputError: As `positions_of_word`.
    """
    if positions := positions_of_word(tokens, word):
        return positions
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    placed = [(i, token, end) for i, (token, end) in enumerate(zip(tokens, ends, strict=True)) if token.strip()]
    starts = {end - len(token.lstrip()) for _, token, end in placed}
    position_at_end = {end - len(token) + len(token.rstrip()): i for i, token, end in placed}
    matches = re.finditer(re.escape(word.strip()), "".join(tokens), re.IGNORECASE)
    return [position_at_end[m.end()] for m in matches if m.start() in starts and m.end() in position_at_end]


def find_position(position_or_word: int | str, tokens: Sequence[str], special: Bool[np.ndarray, " pos"]) -> int:
    """The position of one token of a text, counted from its start.

    Args:
        position_or_word: A position, negative to count from the end; or a word in any case, whose last occurrence is meant. A
            word's position is that of the token that ends it.
        tokens: The text's tokens.
        special: True at tokens that are no text, such as BOS and padding.

    Raises:
        InvalidInputError: No such position, a special token, or no token that ends the word.
    """
    if isinstance(position_or_word, str):
        text_tokens = ["" if is_special else token for token, is_special in zip(tokens, special, strict=True)]
        matches = positions_ending_word(text_tokens, position_or_word)
        if not matches:
            text = "".join(text_tokens).strip()
            raise InvalidInputError(
                f"no token of the text ends the word {position_or_word!r}; the text is {text!r}, its tokens are {list(tokens)}"
            )
        return matches[-1]
    position = operator.index(position_or_word)
    if not -len(tokens) <= position < len(tokens) or special[position]:
        raise InvalidInputError(
            f"got position {position_or_word}, expected one of a word in the {len(tokens)} tokens {list(tokens)}"
        )
    return position % len(tokens)


def starts_word(tokens: Sequence[str], pos: int) -> bool:
    """True where the token at `pos` starts a word: it starts with no sign of a word, or the token before ends with none."""
    token, previous = tokens[pos], tokens[pos - 1] if pos else ""
    return not is_of_word(token[:1]) or not is_of_word(previous[-1:])


def is_of_word(sign: str) -> bool:
    """True for a letter, a digit, a mark on a letter, and a part of a character that several tokens make up."""
    return sign.isalnum() or sign == _PART_OF_CHARACTER or unicodedata.category(sign or " ").startswith("M")


def word_spans(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """First token of each word of a text, and the first after it."""
    starts = [pos for pos in range(len(tokens)) if not pos or starts_word(tokens, pos)]
    return list(pairwise([*starts, len(tokens)]))


def words_of_tokens(tokens: Sequence[str], token_bytes: Sequence[bytes]) -> list[str]:
    """For each token the whole word that it belongs to, with the signs around it; empty where that has no letter or digit.

    Args:
        tokens: Their texts, empty for those that are no text.
        token_bytes: The bytes of these texts, which may be parts of characters.
    """
    words = []
    for first, end in word_spans(tokens):
        word = b"".join(token_bytes[first:end]).decode("utf-8", "replace")
        words += [word if any(sign.isalnum() for sign in word) else ""] * (end - first)
    return words


def letters_of(text: str) -> str:
    """The letters of a text in lower case, with the marks on them; everything else is left out."""
    return "".join(sign for sign in text.lower() if sign.isalpha() or unicodedata.category(sign).startswith("M"))
