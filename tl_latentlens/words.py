"""What sets of rows have in common, in words."""

import math
from collections import Counter
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from tqdm.auto import tqdm

from tl_latentlens.bank import Row
from tl_latentlens.index import ContextualIndex

_NEAR = 8  # tokens to each side that count as near
_BACKGROUND = 2000  # rows that say how common a word is


def labels_of(
    index: ContextualIndex, evidence: Int[np.ndarray, "n rows"], rng: np.random.Generator, progress: bool
) -> list[str]:
    """Up to three words that tell each set of rows from the rest of the bank; empty where no word stands in two of them.

    A word is scored by share x log2(share / share in the bank), at half the weight where it only stands near the rows' tokens.
    Rows past the last of the index count as none.
    """

    @lru_cache(2**16)
    def words(row: int) -> tuple[str, frozenset[str]]:
        return words_around(index.row(row))

    sample = rng.integers(0, index.n_rows, min(index.n_rows, _BACKGROUND)).tolist()
    own, near = Counter(words(row)[0] for row in sample), Counter(word for row in sample for word in words(row)[1])
    labels = []
    for rows in tqdm(evidence.tolist(), desc="labels", unit=" features", delay=2, disable=not progress):
        found = [words(row) for row in set(rows) if row < index.n_rows]
        scores: dict[str, float] = {}
        for weight, common, counts in (
            (1.0, own, Counter(word for word, _ in found)),
            (0.5, near, Counter(word for _, around in found for word in around)),
        ):
            for word, n in counts.items():
                share, background = n / len(found), (common[word] + 0.5) / (len(sample) + 1)
                if n >= 2 and word and share > background:
                    scores[word] = max(scores.get(word, 0.0), weight * share * math.log2(share / background))
        labels.append(", ".join(sorted(scores, key=lambda word: (-scores[word], word))[:3]))
    return labels


def words_around(row: Row) -> tuple[str, frozenset[str]]:
    """The word that a row's token belongs to, and the other words near it; lower case, subwords merged, letters only."""
    tokens, at = row.prompt_tokens, row.position
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
    plain = ["".join(letter for letter in word.lower() if letter.isalpha()) for word in words]
    around = frozenset(word for i, word in enumerate(plain) if i != mine and len(word) > 2)
    return plain[mine], around - {plain[mine]}


def _starts_word(tokens: list[str], place: int) -> bool:
    """True where a token begins a word: at a space, or where letters meet what is none."""
    token, before = tokens[place], tokens[place - 1] if place else ""
    return not token[:1].isalnum() or not before[-1:].isalnum()
