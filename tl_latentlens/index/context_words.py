"""The words that stand near rows in their texts, read from the texts as they are asked for."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from tl_latentlens.corpus.words import letters_of
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.rows import PlacedBank
from tl_latentlens.index.word_table import MIN_LETTERS, stems_of, words_of_bank

_NEAR_TOKENS = 8  # tokens to each side of a row whose words count as near
_NOT_READ = -2
_ROWS_AT_ONCE = 2**16


class ContextWords:
    """The stems of the words near the rows of some banks."""

    def __init__(self, banks: Sequence[PlacedBank], language: str | None) -> None:
        """Read nothing yet.

        Args:
            banks: One of each plan, in row order.
            language: Of the stemmer; None: a word is its own stem.
        """
        self._token_words = [words_of_bank(bank) for _, bank in banks]
        self._first_rows = np.array([first_row for first_row, _ in banks])
        self._stems = [np.full(len(words.plan.tokens), _NOT_READ) for words in self._token_words]
        self._language = language
        self._words: dict[str, int] = {}  # word → its number
        self._stem_ids: dict[str, int] = {}
        self._stem_of_word = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)  # how often each word was read

    def near(self, rows: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
        """Each row, by its place, with the stem of each word that ends within eight tokens of it, every stem once."""
        places, stems = [], []
        part = np.searchsorted(self._first_rows, rows, side="right") - 1
        for i, words in enumerate(self._token_words):
            of_part = np.flatnonzero(part == i)
            plan, own_rows = words.plan, rows[of_part] - self._first_rows[i]
            around = plan.row_tokens[own_rows][:, None] + np.arange(-_NEAR_TOKENS, _NEAR_TOKENS + 1)
            prompts = plan.row_prompts[own_rows]
            is_of_prompt = (around >= plan.prompt_starts[prompts][:, None]) & (
                around < plan.prompt_starts[prompts + 1][:, None]
            )
            around = np.where(is_of_prompt, around, plan.row_tokens[own_rows][:, None])
            self._read(i, np.unique(around))
            found = self._stems[i][around]
            is_word = found >= 0
            places.append(np.broadcast_to(of_part[:, None], found.shape)[is_word])
            stems.append(found[is_word])
        pairs = np.unique(np.stack([np.concatenate(places), np.concatenate(stems)]), axis=1)
        return pairs[0], pairs[1]

    def holds(self, rows: Int[np.ndarray, "..."], words: Sequence[str]) -> Bool[np.ndarray, "... words"]:
        """True where one of some words, or an inflection of it, ends within eight tokens of a row.

        Args:
            rows: Rows, in any shape.
            words: The words.

        Raises:
            InvalidInputError: Something that is not one word of three letters or more.
        """
        for word in words:
            letters = letters_of(word)
            if len(letters) < MIN_LETTERS or letters != word.strip().lower():
                raise InvalidInputError(
                    f"got {word!r}; expected one word of {MIN_LETTERS} letters or more, without other signs"
                )
        different, place = np.unique(rows, return_inverse=True)
        holds = np.zeros((len(different), len(words)), bool)
        for start in range(0, len(different), _ROWS_AT_ONCE):
            near, stems = self.near(different[start : start + _ROWS_AT_ONCE])
            for i, stem in enumerate(self.stem_ids_of(words)):
                holds[start + near[stems == stem], i] = True
        return holds[place.ravel()].reshape(*rows.shape, len(words))

    def stem_ids_of(self, words: Sequence[str]) -> list[int]:
        """The number of each word's stem; -1 for one that was not read."""
        return [self._stem_ids.get(stem, -1) for stem in stems_of([letters_of(word) for word in words], self._language)]

    def stems_at(self, stems: Int[np.ndarray, " n"]) -> list[str]:
        """The stems themselves, by their numbers."""
        names = list(self._stem_ids)
        return [names[i] for i in stems.tolist()]

    def words_of(self, stems: Int[np.ndarray, " n"]) -> list[str]:
        """The word of each stem that was read most often."""
        order = np.argsort(self._counts, kind="stable")
        most_often = np.zeros(len(self._stem_ids), np.int64)
        most_often[self._stem_of_word[order]] = order  # The last one of each stem stays.
        words = list(self._words)
        return [words[i] for i in most_often[stems].tolist()]

    def _read(self, part: int, places: Int[np.ndarray, " n"]) -> None:
        """Read the words of tokens that were not read yet."""
        places = places[self._stems[part][places] == _NOT_READ]
        if not len(places):
            return
        word_ids = self._token_words[part].word_ids(places, self._words)
        new = list(self._words)[len(self._stem_of_word) :]
        stems = stems_of([letters_of(word) for word in new], self._language)
        new_ids = [self._stem_ids.setdefault(stem, len(self._stem_ids)) for stem in stems]
        self._stem_of_word = np.append(self._stem_of_word, np.array(new_ids, np.int64))
        self._counts = np.bincount(word_ids[word_ids >= 0], minlength=len(self._words)) + np.pad(self._counts, (0, len(new)))
        self._stems[part][places] = np.append(self._stem_of_word, -1)[word_ids]
