"""The word at a row, the words near it, and the words that sets of rows have in common.

`corpus.words` says where a word starts and ends among tokens.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Row
from tl_latentlens.corpus.words import letters_of, starts_word, word_spans
from tl_latentlens.index.contextual import ContextualIndex

_NEAR_TOKENS = 8  # tokens to each side of a row whose words count as near
_MAX_WORDS = 3  # words for one set of rows
_MIN_ROWS = 2  # rows of a set that must have a word
_MIN_SHARE = 0.15  # share of a set's rows that must have a word
_MIN_SHARE_RATIO = 4  # A word must occur so many times as often as in the bank.
_BACKGROUND_ROWS = 2000  # random rows that tell how common a word is in the bank


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


_WORD_KINDS: tuple[tuple[float, Callable[[Sequence[RowWords]], list[str]]], ...] = (
    (1.0, lambda rows: [row.word for row in rows]),
    (1.0, lambda rows: [row.piece for row in rows]),
    (0.5, lambda rows: [word for row in rows for word in row.near]),
)
"""The weight of each kind of word in a score, and the words of that kind at some rows."""


def common_words(
    index: ContextualIndex, row_sets: Int[np.ndarray, "n rows"], rng: np.random.Generator, progress: bool
) -> list[str]:
    """Up to three words for each set of rows that tell it from the rest of the bank; empty where there is none.

    A word, or a token that is a part of one ("…ing"), must occur at 15 % of the rows, at two at least, and four times as often
    as in the bank. Words are ranked by share x log2(share / share in the bank). A word that only occurs near the rows' tokens
    counts half. Row numbers past the last row of the index count as none.
    """

    @lru_cache(2**16)
    def words_of(row: int) -> RowWords:
        return word_at_row(index.row(row))

    background = [words_of(row) for row in rng.integers(0, index.n_rows, min(index.n_rows, _BACKGROUND_ROWS)).tolist()]
    background_counts = [Counter(words_of_kind(background)) for _, words_of_kind in _WORD_KINDS]
    labels = []
    for row_ids in tqdm(row_sets.tolist(), desc="labels", unit=" features", delay=2, disable=not progress):
        rows = [words_of(row) for row in set(row_ids) if row < index.n_rows]
        scores = _word_scores(rows, background_counts, len(background))
        labels.append(", ".join(sorted(scores, key=lambda word: (-scores[word], word))[:_MAX_WORDS]))
    return labels


def _word_scores(rows: Sequence[RowWords], background_counts: Sequence[Counter[str]], n_background: int) -> dict[str, float]:
    """The score of each word that is common among some rows and rare in the bank."""
    scores: dict[str, float] = {}
    for (weight, words_of_kind), counts in zip(_WORD_KINDS, background_counts, strict=True):
        for word, n in Counter(words_of_kind(rows)).items():
            share, background_share = n / len(rows), (counts[word] + 0.5) / (n_background + 1)
            if word and n >= _MIN_ROWS and share >= _MIN_SHARE and share >= _MIN_SHARE_RATIO * background_share:
                scores[word] = max(scores.get(word, 0.0), weight * share * math.log2(share / background_share))
    return scores


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
