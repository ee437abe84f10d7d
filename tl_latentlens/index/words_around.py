"""The words that stand around the uses of a word that are nearest to an activation, and not around its other uses."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from tl_latentlens.index.context_words import ContextWords
from tl_latentlens.index.hook_name_search import HookNameSearch
from tl_latentlens.index.rows import BankRows
from tl_latentlens.index.word_table import WordTable
from tl_latentlens.statistics.enrichment import least_rank_sum_p, rank_sum_p, tarone_levels

_MAX_USES = 200  # uses of a word that are compared, evenly spaced over the bank
_MIN_USES = 15  # Fewer say nothing.
_LEVEL = 0.05  # How often any word stands around an activation whose uses stand in a random order.
_MAX_NUMBERS = 2**22  # numbers of the vectors that are compared at once


class WordsAround:
    """The uses of each word at one hook name, and the words near them; see `ContextualIndex.words_around`."""

    def __init__(
        self, query_hook_name: str, search: HookNameSearch, bank_rows: BankRows, table: WordTable, contexts: ContextWords
    ) -> None:
        """Sort the rows of a hook name by the stem of their word, one for each stem and prompt.

        Args:
            query_hook_name: The hook name that the activations come from, a loaded one.
            search: Its search.
            bank_rows: The rows of the index.
            table: Their words.
            contexts: The words near them.
        """
        self._search, self._table, self._contexts = search, table, contexts
        rows = bank_rows.row_ids(query_hook_name)
        rows = rows[table.stem_ids[rows] >= 0]
        keys = np.stack([table.stem_ids[rows], bank_rows.distinct_prompts[rows]])
        _, first = np.unique(keys, axis=1, return_index=True)
        self._rows = rows[first]
        self._stems = table.stem_ids[self._rows]

    def words(self, vectors: Float[Tensor, "n d"], own_words: Sequence[str | None], top_k: int) -> list[list[str]]:
        """For each activation up to `top_k` words, the most telling first; none where its word has too few uses.

        Args:
            vectors: The activations.
            own_words: The word that the token of each belongs to; None or empty: it has none.
            top_k: Most words of each.
        """
        stem_of = {word: (self._table.stem_ids_of(word) or [-1])[-1] for word in set(own_words)}
        stems, group = np.unique(np.array([stem_of[word] for word in own_words], np.int64), return_inverse=True)
        uses, use_group = self._uses(stems)
        n_uses = np.bincount(use_group, minlength=len(stems))
        found: list[list[str]] = [[] for _ in own_words]
        if not len(uses):
            return found
        near_use, near_stem = self._contexts.near(uses)
        names = list(self._table.stems)
        own_ids = np.array(self._contexts.stem_ids_of([names[stem] for stem in stems.tolist()]))
        is_other = near_stem != own_ids[use_group[near_use]]
        near_use, near_stem = near_use[is_other], near_stem[is_other]
        if not len(near_use):
            return found
        is_near = csr_array((np.ones(len(near_use), np.int64), (near_use, near_stem)), shape=(len(uses), near_stem.max() + 1))
        group_uses = csr_array((np.ones(len(uses), np.int64), (use_group, np.arange(len(uses)))), shape=(len(stems), len(uses)))
        all_counts = coo_array(group_uses @ is_near)
        is_rare = 2 * all_counts.data <= n_uses[all_counts.row]
        n_with = csr_array((all_counts.data * is_rare, (all_counts.row, all_counts.col)), shape=all_counts.shape)
        tested = np.flatnonzero(is_rare & (all_counts.data > 1))
        families, n_of = all_counts.row[tested], all_counts.data[tested]
        levels = tarone_levels(least_rank_sum_p(n_of, n_uses[families]), families, len(stems), _LEVEL)
        sums = coo_array(self._ranks(vectors, group, uses, n_uses) @ is_near)
        n_with_word = np.asarray(n_with[group[sums.row], sums.col]).ravel()
        may_hold = np.flatnonzero(n_with_word > 1)
        cells, words, n_of = sums.row[may_hold], sums.col[may_hold], n_with_word[may_hold]
        p = rank_sum_p(sums.data[may_hold], n_of, n_uses[group[cells]])
        holds = np.flatnonzero(p <= levels[group[cells]])
        holds = holds[np.lexsort((words[holds], p[holds], cells[holds]))]
        held_words = self._contexts.words_of(words[holds])
        for query, word in zip(cells[holds].tolist(), held_words, strict=True):
            if len(found[query]) < top_k:
                found[query].append(word)
        return found

    def _uses(self, stems: Int[np.ndarray, " stems"]) -> tuple[Int[np.ndarray, " uses"], Int[np.ndarray, " uses"]]:
        """Up to 200 rows of each stem that has enough of them, evenly spaced, and which of the stems each is of."""
        first, end = (np.searchsorted(self._stems, stems, side) for side in ("left", "right"))
        n_rows = np.where((end - first >= _MIN_USES) & (stems >= 0), end - first, 0)
        n_taken = np.minimum(n_rows, _MAX_USES)
        group = np.repeat(np.arange(len(stems)), n_taken)
        number = np.arange(len(group)) - np.repeat(np.cumsum(n_taken) - n_taken, n_taken)  # counted from 0 for each stem
        return self._rows[first[group] + number * n_rows[group] // n_taken[group]], group

    def _ranks(
        self,
        vectors: Float[Tensor, "n d"],
        group: Int[np.ndarray, " n"],
        uses: Int[np.ndarray, " uses"],
        n_uses: Int[np.ndarray, " stems"],
    ) -> csr_array:
        """The rank of each use of its word among them, the nearest to an activation first, from 1, [n, uses]."""
        queries = np.repeat(np.arange(len(group)), n_uses[group])
        first_use = np.cumsum(n_uses) - n_uses
        number = np.arange(len(queries)) - np.repeat(np.cumsum(n_uses[group]) - n_uses[group], n_uses[group])
        pairs = first_use[group[queries]] + number
        device = self._search.device
        units = torch.zeros(vectors.shape, dtype=torch.float64, device=device)
        at = torch.from_numpy(np.flatnonzero(n_uses[group] > 0))
        units[at.to(device)] = self._search.centered_activations(vectors[at.to(vectors.device)])
        rows = self._search.centered_rows(torch.from_numpy(uses).to(device))
        similarities = np.empty(len(queries))
        for start in range(0, len(queries), step := max(1, _MAX_NUMBERS // vectors.shape[-1])):
            span = slice(start, start + step)
            query_ids, use_ids = (torch.from_numpy(ids[span]).to(device) for ids in (queries, pairs))
            similarities[span] = (units[query_ids] * rows[use_ids]).sum(-1).cpu().numpy()
        ranks = np.empty(len(queries), np.int64)
        ranks[np.lexsort((uses[pairs], -similarities, queries))] = (
            number + 1
        )  # Each query's pairs stand together in both orders.
        return csr_array((ranks, (queries, pairs)), shape=(len(group), len(uses)))
