"""What an index knows of the words of its rows, each made at its first use and kept by the language of the stemmer."""

from collections.abc import Mapping

from tl_latentlens.index.context_words import ContextWords
from tl_latentlens.index.hook_name_search import HookNameSearch
from tl_latentlens.index.nearest_words import NearestWords
from tl_latentlens.index.rows import BankRows
from tl_latentlens.index.word_table import WordTable, make_word_table
from tl_latentlens.index.words_around import WordsAround


class IndexWords:
    """The words of the rows of an index, the words near them, and the searches for both."""

    def __init__(self, searches: Mapping[str, HookNameSearch], bank_rows: BankRows, *, is_approximate: bool) -> None:
        """Make nothing yet.

        Args:
            searches: The loaded hook names.
            bank_rows: Their rows.
            is_approximate: FAISS proposes the rows.
        """
        self._searches, self._bank_rows, self._is_approximate = searches, bank_rows, is_approximate
        self._tables: dict[str | None, WordTable] = {}
        self._contexts: dict[str | None, ContextWords] = {}
        self._nearest: dict[str | None, NearestWords] = {}
        self._around: dict[tuple[str, str | None], WordsAround] = {}

    def searched_by(self, searches: Mapping[str, HookNameSearch]) -> "IndexWords":
        """The same words, searched among the same rows in another geometry."""
        words = IndexWords(searches, self._bank_rows, is_approximate=self._is_approximate)
        words._tables, words._contexts = self._tables, self._contexts
        return words

    def table(self, language: str | None) -> WordTable:
        """The word of each row."""
        if language not in self._tables:
            self._tables[language] = make_word_table([bank for _, bank in self._bank_rows.by_plan], language)
        return self._tables[language]

    def contexts(self, language: str | None) -> ContextWords:
        """The words near each row."""
        if language not in self._contexts:
            self._contexts[language] = ContextWords(self._bank_rows.by_plan, language)
        return self._contexts[language]

    def nearest(self, language: str | None) -> NearestWords:
        """The search for words."""
        if language not in self._nearest:
            table, is_approximate = self.table(language), self._is_approximate
            self._nearest[language] = NearestWords(self._searches, self._bank_rows, table, is_approximate=is_approximate)
        return self._nearest[language]

    def around(self, hook_name: str, language: str | None) -> WordsAround:
        """The words around the uses of each word at one hook name."""
        if (hook_name, language) not in self._around:
            table, contexts, search = self.table(language), self.contexts(language), self._searches[hook_name]
            self._around[hook_name, language] = WordsAround(hook_name, search, self._bank_rows, table, contexts)
        return self._around[hook_name, language]
