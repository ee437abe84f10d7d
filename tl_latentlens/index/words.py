"""The word at a row, and the words near it.

`corpus.words` says where a word starts and ends among tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tl_latentlens.bank.bank import Row
from tl_latentlens.corpus.words import letters_of, starts_word, word_spans

_NEAR_TOKENS = 8  # tokens to each side of a row whose words count as near


@dataclass(frozen=True)
class RowWords:
    """The words at and near a row, in lower case, letters only.

    Attributes:
        word: The word that its token belongs to, subwords merged.
        piece: The token itself where it is a part of a word, with … where the word goes on; else empty.
        near: The other words of three letters or more near it.
    """

    word: str
    piece: str
    near: frozenset[str]


def word_at_row(row: Row) -> RowWords:
    """The word at a row, and those near it."""
    special_ids = set(row.bank.file.metadata.special_ids)
    token_ids, position = row.bank.prompt(row.prompt_index), row.position
    tokens = ["" if i in special_ids else row.bank.token_string(i) for i in token_ids]
    spans, own_word = _words_near(tokens, position)
    plain_words = [letters_of(row.bank.text(token_ids[first:end])) for first, end in spans]
    own = plain_words[own_word]
    near = frozenset(word for i, word in enumerate(plain_words) if i != own_word and len(word) > 2)
    piece = letters_of(row.bank.text([token_ids[position]]))
    if piece == own:
        piece = ""
    elif piece:
        continues = position + 1 < len(tokens) and not starts_word(tokens, position + 1)
        piece = "…" * (not starts_word(tokens, position)) + piece + "…" * continues
    return RowWords(own, piece, near - {own})


def _words_near(tokens: Sequence[str], position: int) -> tuple[list[tuple[int, int]], int]:
    """The spans of the whole words within some tokens of a position, and which of them the position is in."""
    first, end = max(0, position - _NEAR_TOKENS), position + _NEAR_TOKENS + 1
    while first > 0 and not starts_word(tokens, first):
        first -= 1
    while end < len(tokens) and not starts_word(tokens, end):
        end += 1
    spans = [(first + start, first + stop) for start, stop in word_spans(tokens[first:end])]
    return spans, next(i for i, (_, stop) in enumerate(spans) if position < stop)
