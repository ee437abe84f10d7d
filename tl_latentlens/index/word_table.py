"""The whole word that each row of a bank ends, and its stem, for all rows at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import snowballstemmer
from jaxtyping import Bool, Int

from tl_latentlens.bank.bank import Bank
from tl_latentlens.corpus.words import letters_of
from tl_latentlens.errors import InvalidInputError

_MIN_LETTERS = 3  # A shorter word says little.
_MAX_TOKENS = 32  # A longer run of letters is no word.
_NO_WORD = -1


@dataclass(frozen=True, eq=False)
class WordTable:
    """The words of the rows of an index.

    A row has a word where its token ends one of three letters or more without digits, subwords merged. Rows inside a word or at
    the start of an unfinished one, punctuation, digits and special tokens have none.

    Attributes:
        word_ids: For each row the place of its word in `words`; -1: none.
        stem_ids: For each row a number of the stem of its word; -1: none. Inflections of a word have the same.
        words: The words, in lower case.
        stems: Stem → its number.
        language: Of the stemmer; None: a word is its own stem.
    """

    word_ids: Int[np.ndarray, " rows"]
    stem_ids: Int[np.ndarray, " rows"]
    words: list[str]
    stems: dict[str, int]
    language: str | None

    def stem_id(self, word: str | None) -> int:
        """The number of the stem of any word; -2 for None, and for a stem that no row has."""
        return -2 if word is None else self.stems.get(next(iter(stems_of([letters_of(word)], self.language))), -2)


def make_word_table(banks: Sequence[Bank], language: str | None) -> WordTable:
    """The words of the rows of some banks, one bank's after the other's.

    Args:
        banks: One of each plan, in row order.
        language: Of the stemmer, as Snowball names it ("english"); None: words are the same where their letters are.

    Raises:
        InvalidInputError: A language without a stemmer.
    """
    ids: dict[str, int] = {}
    word_ids = [_word_ids(bank, ids) for bank in banks]
    words = list(ids)
    stems: dict[str, int] = {}
    stem_of_word = [stems.setdefault(stem, len(stems)) for stem in stems_of([letters_of(word) for word in words], language)]
    all_ids = np.concatenate(word_ids)
    stem_ids = np.array([*stem_of_word, _NO_WORD])[all_ids]  # -1 is the last place.
    return WordTable(all_ids, stem_ids, words, stems, language)


def stems_of(words: Sequence[str], language: str | None) -> list[str]:
    """The stem of each word, by Snowball (Porter 2001); the words themselves where `language` is None.

    Raises:
        InvalidInputError: A language without a stemmer.
    """
    if language is None:
        return list(words)
    if language not in (known := snowballstemmer.algorithms()):
        raise InvalidInputError(f"got language={language!r}; expected None, or one that has a stemmer: {', '.join(known)}")
    return snowballstemmer.stemmer(language).stemWords(list(words))


def _word_ids(bank: Bank, ids: dict[str, int]) -> Int[np.ndarray, " rows"]:
    """For each row of a bank the number of its word in `ids`, which gets the new ones; -1: none."""
    plan = bank.plan
    starts_word = _starts_of_words(bank)
    first = np.maximum.accumulate(np.where(starts_word, np.arange(len(starts_word)), 0))[plan.row_tokens]
    ends_word = np.append(starts_word[1:], True)[plan.row_tokens]
    n_tokens = np.where(ends_word, plan.row_tokens - first + 1, 0)
    word_ids = np.full(len(first), _NO_WORD)
    for length in np.unique(n_tokens[(n_tokens > 0) & (n_tokens <= _MAX_TOKENS)]).tolist():
        rows = np.flatnonzero(n_tokens == length)
        sequences, place = np.unique(plan.tokens[first[rows, None] + np.arange(length)], axis=0, return_inverse=True)
        words = [_plain_word(bank.text(sequence)) for sequence in sequences.tolist()]
        new_ids = [ids.setdefault(word, len(ids)) if word else _NO_WORD for word in words]
        word_ids[rows] = np.array(new_ids)[place.ravel()]
    return word_ids


def _starts_of_words(bank: Bank) -> Bool[np.ndarray, " tokens"]:
    """True for tokens of all prompts that start a word, as `corpus.words.starts_word` says for one prompt."""
    plan, special_ids = bank.plan, set(bank.file.metadata.special_ids)
    used, place = np.unique(plan.tokens, return_inverse=True)
    texts = ["" if token_id in special_ids else bank.token_string(token_id) for token_id in used.tolist()]
    begins_with_letter = np.array([text[:1].isalnum() for text in texts])[place]
    ends_with_letter = np.array([text[-1:].isalnum() for text in texts])[place]
    starts_word = ~begins_with_letter | ~np.append(False, ends_with_letter[:-1])
    starts_word[plan.prompt_starts[:-1]] = True
    return starts_word


def _plain_word(text: str) -> str:
    """A word in lower case without what stands around it; empty for what is no word."""
    letters = letters_of(text)
    if len(letters) < _MIN_LETTERS or any(sign.isdigit() for sign in text):
        return ""
    word = text.lower().strip()
    first = next(i for i, sign in enumerate(word) if sign.isalpha())
    last = next(i for i, sign in enumerate(reversed(word)) if sign.isalpha())
    return word[first : len(word) - last]
