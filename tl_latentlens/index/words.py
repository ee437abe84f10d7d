"""The word at a row, the words near it, and the words that sets of rows have in common."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Row
from tl_latentlens.corpus.words import letters_of, starts_word
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
    special = set(row.bank.file.metadata.special_ids)
    ids = row.bank.prompt(row.prompt_index)
    tokens, at = ["" if i in special else row.bank.token_string(i) for i in ids], row.position
    words: list[str] = []
    mine = -1
    low, high = max(0, at - _NEAR), at + _NEAR + 1
    while low > 0 and not starts_word(tokens, low):
        low -= 1
    while high < len(tokens) and not starts_word(tokens, high):
        high += 1
    for place in range(low, min(high, len(tokens))):
        if starts_word(tokens, place) or not words:
            words.append("")
        words[-1] += tokens[place]
        if place == at:
            mine = len(words) - 1
    plain = [letters_of(word) for word in words]
    near = frozenset(word for i, word in enumerate(plain) if i != mine and len(word) > 2)
    piece = letters_of(tokens[at])
    if piece == plain[mine]:
        piece = ""
    elif piece:
        goes_on = at + 1 < len(tokens) and not starts_word(tokens, at + 1)
        piece = "…" * (not starts_word(tokens, at)) + piece + "…" * goes_on
    return Words(plain[mine], piece, near - {plain[mine]})
