"""The nearest words of vectors: each word once, at its nearest row, from a search that goes as deep as it must."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.found_rows import FoundRows
from tl_latentlens.index.near_word import NearWord
from tl_latentlens.index.search_result import OnDevice, SearchedIndex, SearchResult, in_leading_shape
from tl_latentlens.index.word_table import WordTable


@dataclass(frozen=True)
class WordSearchResult(OnDevice):
    """The words near each query, nearest first, each once.

    Attributes:
        similarities: Cosines of the words' nearest rows, float32, [..., k]; NaN past the last word.
        rows: These rows, int64, [..., k]; -1 past the last word.
        hook_ids: Places in `index.hook_names`, int64, [..., k]; -1 past the last word.
        index: The `ContextualIndex` that was searched.
        table: The words of its rows.
        chances: How likely a random activation comes as near to each row, [..., k]; None where it was not asked for.
    """

    similarities: Float[Tensor, "... k"]
    rows: Int[Tensor, "... k"]
    hook_ids: Int[Tensor, "... k"]
    index: SearchedIndex = field(repr=False)
    table: WordTable = field(repr=False)
    chances: Float[Tensor, "... k"] | None = None

    def words_of(self, query: int) -> list[NearWord]:
        """The words near one query, counted over the flattened leading shape."""
        tensors = [self.rows, self.hook_ids, self.similarities, *([] if self.chances is None else [self.chances])]
        columns = [tensor.reshape(-1, self.rows.shape[-1])[query].tolist() for tensor in tensors]
        words = []
        for row, hook_id, similarity, *chance in zip(*columns, strict=True):
            if row >= 0:
                neighbor = self.index.neighbor(row, hook_id, similarity, *chance)
                word = self.table.words[self.table.word_ids[row]]
                words.append(NearWord(word, similarity, neighbor.chance, neighbor))
        return words

    def texts_of(self, query: int) -> list[str]:
        """The same, the words alone."""
        rows = self._host_rows[query]
        return [self.table.words[i] for i in self.table.word_ids[rows[rows >= 0]].tolist()]

    @cached_property
    def _host_rows(self) -> Int[np.ndarray, "n k"]:
        return self.rows.reshape(-1, self.rows.shape[-1]).cpu().numpy()

    def words(self) -> Any:
        """The words near each query, in nested lists of the queries' leading shape."""
        return in_leading_shape(self.words_of, self.rows.shape[:-1])

    def to_dataframe(self) -> pd.DataFrame:
        """A line for each query and word: query, rank, word, similarity, chance if known, token, context, hook_name, row."""
        lines = []
        for query in range(math.prod(self.rows.shape[:-1])):
            for rank, near in enumerate(self.words_of(query)):
                at = near.neighbor
                line = {"query": query, "rank": rank + 1, "word": near.word, "similarity": near.similarity}
                chance = {} if near.chance is None else {"chance": near.chance}
                place = {"token": at.token, "context": at.context, "hook_name": at.hook_name, "row": at.row}
                lines.append(line | chance | place)
        columns = ["query", "rank", "word", "similarity", "token", "context", "hook_name", "row"]
        return pd.DataFrame(lines) if lines else pd.DataFrame(columns=columns)


def left_out_stems(
    unlike: str | Sequence[str | None] | None, n_queries: int, table: WordTable
) -> Int[np.ndarray, "queries words"]:
    """The stems that each query leaves out, padded with -2.

    Raises:
        InvalidInputError: No word, or another number of words than of queries.
    """
    words = [unlike] * n_queries if unlike is None or isinstance(unlike, str) else unlike
    require_words(words, n_queries)
    ids_of = {word: table.stem_ids_of(word) for word in set(words)}
    width = max(map(len, ids_of.values()), default=0)
    padded = {word: ids + [-2] * (width - len(ids)) for word, ids in ids_of.items()}
    return np.array([padded[word] for word in words], np.int64).reshape(n_queries, width)


def require_words(words: Any, n_queries: int) -> None:
    """Check that there is a word, or None, for each query.

    Raises:
        InvalidInputError: There is not.
    """
    is_list = isinstance(words, list | tuple | np.ndarray)
    if not is_list or len(words) != n_queries or not all(word is None or isinstance(word, str) for word in words):
        got = f"{len(words)} words" if is_list else f"{words!r:.80}"
        raise InvalidInputError(
            f"got {got}; expected one word, or a list with a word (or None) for each of {n_queries} vectors"
        )


def chances_of(words: FoundRows, index: SearchedIndex) -> Float[Tensor, "q k"]:
    """The chance of each word's nearest row; NaN past the last word."""
    is_word = words.rows >= 0
    chances = torch.full_like(words.similarities, torch.nan)
    similarities, rows, hook_ids = (values[is_word][:, None] for values in (words.similarities, words.rows, words.hook_ids))
    found = SearchResult(similarities, rows, hook_ids, index)
    chances[is_word] = index.chances(found)[:, 0]
    return chances
