"""Words of tokens: where a word starts and ends among the tokens of a text. Says nothing about rows; `index.words` does."""

import operator
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from tl_latentlens.errors import InvalidInputError


def positions_of_word(tokens: Sequence[str], word: str) -> list[int]:
    """The position of the last token of each occurrence of a whole word, in any case."""
    ends = np.cumsum([len(token) for token in tokens])
    matches = re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", "".join(tokens), re.IGNORECASE)
    return [int(np.searchsorted(ends, match.end(), "left")) for match in matches]


def find_position(position_or_word: int | str, tokens: Sequence[str], special: Bool[np.ndarray, " pos"]) -> int:
    """The position of one token of a text, counted from its start.

    Args:
        position_or_word: A position, negative to count from the end; or a word, whose last occurrence is meant. A word's
            position is that of the token that ends it.
        tokens: The text's tokens.
        special: True at BOS and padding.

    Raises:
        InvalidInputError: No such position, BOS or padding, or no token that ends the word.
    """
    if isinstance(position_or_word, str):
        word = position_or_word.strip()
        matches = [pos for pos in range(len(tokens)) if not special[pos] and word_ending_at(tokens, pos) == word]
        if not matches:
            raise InvalidInputError(f"no token of the text ends the word {position_or_word!r}; its tokens are {list(tokens)}")
        return matches[-1]
    position = operator.index(position_or_word)
    if not -len(tokens) <= position < len(tokens) or special[position]:
        raise InvalidInputError(
            f"got position {position_or_word}, expected one of a word in the {len(tokens)} tokens {list(tokens)}"
        )
    return position % len(tokens)


def word_ending_at(tokens: Sequence[str], pos: int) -> str:
    """The word that the token at `pos` ends: this token, and the ones before it back to one that starts with a space."""
    start = pos
    while start > 0 and not tokens[start].startswith(" ") and not tokens[start - 1].startswith("<"):
        start -= 1
    return "".join(tokens[start : pos + 1]).strip()


def starts_word(tokens: Sequence[str], pos: int) -> bool:
    """True where the token at `pos` starts a word: it starts with no letter or digit, or the token before ends with none."""
    token, previous = tokens[pos], tokens[pos - 1] if pos else ""
    return not token[:1].isalnum() or not previous[-1:].isalnum()


def letters_of(text: str) -> str:
    """The letters of a text in lower case; everything else is left out."""
    return "".join(letter for letter in text.lower() if letter.isalpha())
