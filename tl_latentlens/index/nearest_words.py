"""The nearest words of vectors: each word once, at its nearest row."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.index.cross_layer import n_found_in, search_labels
from tl_latentlens.index.found_rows import FoundRows
from tl_latentlens.index.grouped import nearest_of_groups, row_search
from tl_latentlens.index.hook_name_search import HookNameSearch
from tl_latentlens.index.rows import BankRows
from tl_latentlens.index.word_table import WordTable
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.error_bounds import float32_similarity_error

_ROWS_PER_STEM = 2  # rows of each stem that tell how near so many words are at least
_MIN_STEMS_PER_WORD = 4  # Where fewer stems than this many times the words are there, rows are ranked one by one.
_FIRST_DEPTH, _DEEPER = 128, 8  # so many rows of each query are ranked first; then eight times as many, and so on
_MAX_NUMBERS = 2**24  # numbers of the vectors, or of their similarities, that are held at once


class NearestWords:
    """The search for words among the rows of an index."""

    def __init__(
        self, searches: Mapping[str, HookNameSearch], bank_rows: BankRows, table: WordTable, *, is_approximate: bool
    ) -> None:
        """Keep what is searched.

        Args:
            searches: The loaded hook names.
            bank_rows: Their rows.
            table: The words of the rows.
            is_approximate: FAISS proposes the rows.
        """
        self._searches, self._bank_rows, self._is_approximate = searches, bank_rows, is_approximate
        device = next(iter(searches.values())).device
        self._stem_ids, self._n_stems = torch.from_numpy(table.stem_ids).to(device), len(table.stems)
        self._few_rows: dict[str, Int[Tensor, "stems few"]] = {}

    def search(
        self,
        queries: Mapping[str, Float[Tensor, "q d"]],
        top_k: int,
        query_hook_name: str | None,
        left_out: Int[Tensor, "q stems"],
    ) -> FoundRows:
        """The nearest row of each of the `top_k` nearest stems of each query; -1 and NaN where there are fewer.

        Args:
            queries: Each hook name to search, and the queries as it compares them.
            top_k: Words of each query.
            query_hook_name: The hook name that the queries come from.
            left_out: Stems that each query leaves out, padded with numbers below -1.
        """
        first_name, units = next(iter(queries.items()))
        if self._is_approximate or not len(units) or top_k * _MIN_STEMS_PER_WORD > self._n_stems:
            search = row_search(queries, self._searches, query_hook_name, is_approximate=self._is_approximate)
            n_found, depths = n_found_in(queries, self._searches), (_FIRST_DEPTH, _DEEPER)
            return nearest_of_groups(search, len(left_out), n_found, top_k, self._stem_ids.__getitem__, left_out, depths)
        own_name = query_hook_name if query_hook_name is not None and query_hook_name in queries else first_name
        floor = self._floor(own_name, queries[own_name], top_k, left_out)
        return search_labels(queries, self._searches, top_k, self._stem_ids, left_out, floor)

    @own_arithmetic(full_products=True)
    def _floor(
        self, hook_name: str, queries: Float[Tensor, "q d"], top_k: int, left_out: Int[Tensor, "q stems"]
    ) -> Float[Tensor, " q"]:
        """A similarity that `top_k` stems reach at one hook name: that of two rows of each, at least."""
        search, rows = self._searches[hook_name], self._rows_of_stems(hook_name)
        margin = 3 * float32_similarity_error(search.d, 1.0)
        floors = []
        for part in torch.arange(len(queries), device=rows.device).split(max(1, _MAX_NUMBERS // (4 * _ROWS_PER_STEM * 1024))):
            best = torch.full((len(part), top_k), -torch.inf, dtype=torch.float32, device=rows.device)
            for stems in torch.arange(len(rows), device=rows.device).split(1024):
                units, penalties = search.normalized_rows(rows[stems].flatten().clamp(min=0))
                scores = (queries[part] @ units.T - penalties).view(len(part), len(stems), -1)
                scores = scores.masked_fill(rows[stems] < 0, -torch.inf).amax(-1)
                for words in left_out[part].unbind(-1):
                    scores = scores.masked_fill(words[:, None] == stems, -torch.inf)
                best = torch.cat([best, scores], -1).topk(top_k, dim=-1).values
            floors.append(best[:, -1] - margin)
        return torch.cat(floors)

    def _rows_of_stems(self, hook_name: str) -> Int[Tensor, "stems few"]:
        """Up to two rows of each stem at a hook name, chosen at random; -1 where it has fewer."""
        if hook_name not in self._few_rows:
            rows = np.random.default_rng(0).permutation(self._bank_rows.row_ids(hook_name))
            stems = self._stem_ids.cpu().numpy()[rows]
            rows, stems = rows[stems >= 0], stems[stems >= 0]
            order = np.argsort(stems, kind="stable")
            number = np.arange(len(order)) - np.searchsorted(stems[order], stems[order])  # counted from 0 for each stem
            few = np.full((self._n_stems, _ROWS_PER_STEM), -1)
            taken = order[number < _ROWS_PER_STEM]
            few[stems[taken], number[number < _ROWS_PER_STEM]] = rows[taken]
            self._few_rows[hook_name] = torch.from_numpy(few).to(self._stem_ids.device)
        return self._few_rows[hook_name]
