"""Words made of tokens: which token ends one, which stand around a row, and what sets of rows have in common."""

import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Row
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex

_NEAR = 8  # tokens to each side that count as near
_SHARE = 0.15  # of the rows, and at least two of them, must hold a word that says something of them
_RATIO = 4  # times as often as in the bank
_BACKGROUND = 2000  # rows that say how common a word is


def labels_of(
    index: ContextualIndex, evidence: Int[np.ndarray, "n rows"], rng: np.random.Generator, progress: bool
) -> list[str]:
    """Up to three words that tell each set of rows from the rest of the bank; empty where there is none.

    A word, or a part of one that is a token ("…ing"), must stand in 15 % of the rows, in two at least, and four times as often
    as in the bank. It is scored by share x log2(share / share in the bank), at half the weight where it only stands near the
    rows' tokens. Rows past the last of the index count as none.
    """

    @lru_cache(2**16)
    def words(row: int) -> Words:
        return words_around(index.row(row))

    sample = [words(row) for row in rng.integers(0, index.n_rows, min(index.n_rows, _BACKGROUND)).tolist()]
    kinds = (
        (1.0, lambda found: [one.word for one in found]),
        (1.0, lambda found: [one.piece for one in found]),
        (0.5, lambda found: [word for one in found for word in one.near]),
    )
    common = [Counter(listed(sample)) for _, listed in kinds]
    labels = []
    for rows in tqdm(evidence.tolist(), desc="labels", unit=" features", delay=2, disable=not progress):
        found = [words(row) for row in set(rows) if row < index.n_rows]
        scores: dict[str, float] = {}
        for (weight, listed), in_bank in zip(kinds, common, strict=True):
            for word, n in Counter(listed(found)).items():
                share, background = n / len(found), (in_bank[word] + 0.5) / (len(sample) + 1)
                if word and n >= 2 and share >= _SHARE and share >= _RATIO * background:
                    scores[word] = max(scores.get(word, 0.0), weight * share * math.log2(share / background))
        labels.append(", ".join(sorted(scores, key=lambda word: (-scores[word], word))[:3]))
    return labels


@dataclass(frozen=True)
class Words:
    """What stands at a row, in lower case, letters only.

    Attributes:
        word: The word that its token belongs to, subwords merged.
        piece: The token itself where it is a part of a word, with … where the word goes on; else empty.
        near: The other words of three letters or more near it.
    """

    word: str
    piece: str
    near: frozenset[str]


def words_around(row: Row) -> Words:
    """The word at a row, and those near it."""
    special = set(row.bank.layout.attributes.special_ids)
    ids = row.bank.prompt(row.prompt_index)
    tokens, at = ["" if i in special else row.bank.token_string(i) for i in ids], row.position
    words: list[str] = []
    mine = -1
    low, high = max(0, at - _NEAR), at + _NEAR + 1
    while low > 0 and not _starts_word(tokens, low):
        low -= 1
    while high < len(tokens) and not _starts_word(tokens, high):
        high += 1
    for place in range(low, min(high, len(tokens))):
        if _starts_word(tokens, place) or not words:
            words.append("")
        words[-1] += tokens[place]
        if place == at:
            mine = len(words) - 1
    plain = [_letters(word) for word in words]
    near = frozenset(word for i, word in enumerate(plain) if i != mine and len(word) > 2)
    piece = _letters(tokens[at])
    if piece == plain[mine]:
        piece = ""
    elif piece:
        goes_on = at + 1 < len(tokens) and not _starts_word(tokens, at + 1)
        piece = "…" * (not _starts_word(tokens, at)) + piece + "…" * goes_on
    return Words(plain[mine], piece, near - {plain[mine]})


def positions_of_word(tokens: Sequence[str], word: str) -> list[int]:
    """Where the whole word ends: the position of the last token of each of its occurrences, whatever their case."""
    ends = np.cumsum([len(token) for token in tokens])
    found = re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", "".join(tokens), re.IGNORECASE)
    return [int(np.searchsorted(ends, match.end(), "left")) for match in found]


def position_of(at: int | str, tokens: Sequence[str], special: Bool[np.ndarray, " pos"]) -> int:
    """A position of a text: one that is given, negative from the end, or the last token that ends a word.

    Args:
        at: A position or a word.
        tokens: The text's tokens.
        special: True at BOS and padding.

    Raises:
        InvalidInputError: No such position, BOS or padding, or no token that ends the word.
    """
    if isinstance(at, str):
        matching = [pos for pos in range(len(tokens)) if not special[pos] and word_up_to(tokens, pos) == at.strip()]
        if not matching:
            raise InvalidInputError(f"no token of the text ends the word {at!r}; its tokens are {list(tokens)}")
        return matching[-1]
    position = operator.index(at)
    if not -len(tokens) <= position < len(tokens) or special[position]:
        raise InvalidInputError(f"got position {at}, expected one of a word in the {len(tokens)} tokens {list(tokens)}")
    return position % len(tokens)


def word_up_to(tokens: Sequence[str], pos: int) -> str:
    """The word that a token ends: its earlier pieces, back to the one that starts with a space, and itself."""
    start = pos
    while start > 0 and not tokens[start].startswith(" ") and not tokens[start - 1].startswith("<"):
        start -= 1
    return "".join(tokens[start : pos + 1]).strip()


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalpha())


def _starts_word(tokens: list[str], place: int) -> bool:
    """True where a token begins a word: at a space, or where letters meet what is none."""
    token, before = tokens[place], tokens[place - 1] if place else ""
    return not token[:1].isalnum() or not before[-1:].isalnum()
