"""The whole word that each row of a bank ends, and its stem, for all rows at once."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

import numpy as np
import snowballstemmer
from jaxtyping import Bool, Int

from tl_latentlens.bank.bank import Bank
from tl_latentlens.corpus.plan import Plan
from tl_latentlens.corpus.words import is_of_word, letters_of
from tl_latentlens.errors import InvalidInputError

MIN_LETTERS = 3  # A shorter word says little.
_MAX_TOKENS = 32  # A longer run of letters is no word.
_MAX_STEMS = 2**18  # that are remembered
_NO_WORD = -1
_PARTS = re.compile(r"[\s\-–—/]+")  # what parts the words of a text
_CONTRACTION = re.compile(r"['’](?!s$)[^\W\d_]+", re.IGNORECASE)  # 't of don't: what stands before it is no word by itself


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

    def stem_ids_of(self, text: str | None) -> list[int]:
        """The numbers of the stems of the words of a text; none for None, and for stems that no row has."""
        words = [] if text is None else [word for part in _PARTS.split(text) if (word := letters_of(part))]
        return [self.stems[stem] for stem in stems_of(words, self.language) if stem in self.stems]


def make_word_table(banks: Sequence[Bank], language: str | None) -> WordTable:
    """The words of the rows of some banks, one bank's after the other's.

    Args:
        banks: One of each plan, in row order.
        language: Of the stemmer, as Snowball names it ("english"); None: words are the same where their letters are.

    Raises:
        InvalidInputError: A language without a stemmer.
    """
    ids: dict[str, int] = {}
    word_ids = [words_of_bank(bank).word_ids(bank.plan.row_tokens, ids) for bank in banks]
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
    known = snowballstemmer.algorithms()
    if not isinstance(language, str) or language not in known:
        raise InvalidInputError(f"got language={language!r}; expected None, or one that has a stemmer: {', '.join(known)}")
    return [_stem(word, language) for word in words]


@lru_cache(maxsize=_MAX_STEMS)
def _stem(word: str, language: str) -> str:
    """A word's stem; the same words are asked for by every index and by all labels."""
    return _stemmer(language, get_ident()).stemWord(word)


@lru_cache
def _stemmer(language: str, thread: int) -> Any:
    """A stemmer of a thread's own: it holds the word that it works on."""
    return snowballstemmer.stemmer(language)


@runtime_checkable
class TextOfTokens(Protocol):
    """What tells the text of tokens: a bank, or a tokenizer."""

    def token_string(self, token_id: int) -> str:
        """The text of one token."""
        ...

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens in sequence, special tokens left out."""
        ...


def words_of_bank(bank: Bank) -> "TokenWords":
    """The words that the tokens of a bank's texts end."""
    return TokenWords(bank.plan, bank, bank.file.metadata.special_ids)


class TokenWords:
    """The words that the tokens of a plan's texts end."""

    def __init__(self, plan: Plan, texts: TextOfTokens, special_ids: Iterable[int]) -> None:
        """Tell where words start.

        Args:
            plan: The tokens.
            texts: Tells their text.
            special_ids: Tokens that are no text.
        """
        self._texts, self.plan, self._special_ids = texts, plan, set(special_ids)
        self.starts_word, is_contraction = self._starts_of_words()
        starts_word, places = self.starts_word, np.arange(len(self.starts_word))
        self._first = np.maximum.accumulate(np.where(starts_word, places, 0))  # of each token's word
        ends = np.where(np.append(starts_word[1:], True), places, len(places))
        self._last = np.minimum.accumulate(ends[::-1])[::-1]
        self._ends_word = np.append(starts_word[1:] & ~is_contraction[1:], True)

    def word_ids(self, places: Int[np.ndarray, " n"], ids: dict[str, int]) -> Int[np.ndarray, " n"]:
        """For each token, by its place in the plan, the number of its word in `ids`, which gets the new ones; -1: none."""
        first = self._first[places]
        n_tokens = np.where(self._ends_word[places], places - first + 1, 0)
        word_ids = np.full(len(first), _NO_WORD)
        for length in np.unique(n_tokens[(n_tokens > 0) & (n_tokens <= _MAX_TOKENS)]).tolist():
            of_length = np.flatnonzero(n_tokens == length)
            spans = self.plan.tokens[first[of_length, None] + np.arange(length)]
            sequences, place = np.unique(spans, axis=0, return_inverse=True)
            words = [_plain_word(self._texts.text(sequence)) for sequence in sequences.tolist()]
            new_ids = [ids.setdefault(word, len(ids)) if word else _NO_WORD for word in words]
            word_ids[of_length] = np.array(new_ids)[place.ravel()]
        return word_ids

    def whole_word_ids(self, places: Int[np.ndarray, " n"], ids: dict[str, int]) -> Int[np.ndarray, " n"]:
        """As `word_ids`, for tokens anywhere in their word."""
        return self.word_ids(self._last[places], ids)

    def _starts_of_words(self) -> tuple[Bool[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
        """Which tokens start a word, as `corpus.words.starts_word` says for one prompt, and which contract one."""
        plan = self.plan
        used, place = np.unique(plan.tokens, return_inverse=True)
        texts = ["" if token_id in self._special_ids else self._texts.token_string(token_id) for token_id in used.tolist()]
        begins, ends = (
            np.array([is_of_word(text[at]) for text in texts], bool)[place] for at in (slice(0, 1), slice(-1, None))
        )
        starts_word = ~begins | ~np.append(False, ends[:-1])
        starts_word[plan.prompt_starts[:-1]] = True
        is_contraction = np.array([_CONTRACTION.fullmatch(text) is not None for text in texts], bool)[place]
        is_contraction[plan.prompt_starts[:-1]] = False
        return starts_word, is_contraction


def _plain_word(text: str) -> str:
    """A word in lower case without what stands around it; empty for what is no word."""
    letters = letters_of(text)
    if len(letters) < MIN_LETTERS or any(sign.isdigit() for sign in text):
        return ""
    word = text.lower().strip()
    first, *_, last = (i for i, sign in enumerate(word) if letters_of(sign))
    return word[first : last + 1]
