"""Whether a bank knows a token: how near it is to its nearest row, among how near the bank's own tokens are to theirs."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.index.cross_layer import centered_rows, search_hook_names, transform_queries
from tl_latentlens.index.hook_name_search import HookNameSearch
from tl_latentlens.index.rows import BankRows
from tl_latentlens.search.ambient import own_arithmetic

_REFERENCE_ROWS = 256  # rows of the bank whose nearest rows tell how near a known token is
_ROWS_PER_SEARCH = 256
_TOP_K = 8  # rows in which one of another prompt is looked for first; then in four times as many, and so on
_COSINE_ERROR = 1e-6  # a cosine of vectors that were rounded to float32 is off by about this
_MAX_NUMBERS = 2**24  # numbers of the vectors that are compared at once


class KnownTokens:
    """How near a bank's tokens at one hook name are to their nearest rows in other prompts; see `ContextualIndex.known`."""

    def __init__(
        self,
        query_hook_name: str,
        searched: Sequence[str],
        searches: Mapping[str, HookNameSearch],
        bank_rows: BankRows,
        *,
        is_approximate: bool,
    ) -> None:
        """Compute nothing yet.

        Args:
            query_hook_name: The hook name that the activations come from, a loaded one.
            searched: The hook names that are searched.
            searches: The loaded hook names.
            bank_rows: Their rows.
            is_approximate: FAISS proposes the rows.
        """
        self.query_hook_name, self._searched = query_hook_name, searched
        self._searches, self._bank_rows, self._is_approximate = searches, bank_rows, is_approximate

    def shares(
        self, vectors: Float[Tensor, "n d"], rows: Int[Tensor, " n"], hook_ids: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"] | None:
        """The share of the bank's tokens that are no nearer to their nearest row than each activation is to its own.

        Args:
            vectors: The activations.
            rows: The nearest row of each.
            hook_ids: The hook name of that row.

        Returns:
            Float32, in (0, 1]; None where no token of the bank stands in two prompts.
        """
        if not len(self.reference):
            return None
        search, n_at_once = self._searches[self.query_hook_name], max(1, _MAX_NUMBERS // vectors.shape[-1])
        similarities = [self.reference[:0]]
        for part in (slice(start, start + n_at_once) for start in range(0, len(rows), n_at_once)):
            nearest = centered_rows(self._searches, rows[part], hook_ids[part], search.d)
            similarities.append((search.centered_activations(vectors[part]) * nearest).sum(-1))
        n_no_nearer = torch.searchsorted(self.reference, torch.cat(similarities) + _COSINE_ERROR, right=True)
        return (1 + n_no_nearer).float() / (1 + len(self.reference))

    @cached_property
    @own_arithmetic(full_products=True)
    def reference(self) -> Float[Tensor, " n"]:
        """The similarities of up to 256 rows to their nearest row in another prompt, ascending, float64."""
        row_ids = self._rows_of_shared_tokens()
        centered = self._searches[self.query_hook_name].centered_rows(torch.from_numpy(row_ids).to(self._device))
        is_zero = ~centered.any(-1)
        row_ids, centered = row_ids[~is_zero.cpu().numpy()], centered[~is_zero]
        similarities = [centered.new_zeros(0)]
        steps = torch.arange(len(row_ids)).split(_ROWS_PER_SEARCH)
        with tqdm(total=len(row_ids), desc=f"known, {self.query_hook_name}", unit=" rows", delay=2, leave=False) as bar:
            for step in steps:
                is_found, rows, hook_ids = self._nearest_in_other_prompts(row_ids[step.numpy()])
                units = centered[step.to(self._device)][is_found]
                nearest = centered_rows(self._searches, rows[is_found], hook_ids[is_found], units.shape[-1])
                similarities.append((units * nearest).sum(-1))
                bar.update(len(step))
        return torch.cat(similarities).sort().values

    @property
    def _device(self) -> torch.device:
        return self._searches[self.query_hook_name].null_sample.units.device

    def _rows_of_shared_tokens(self) -> Int[np.ndarray, " n"]:
        """Up to 256 rows of the hook name whose token stands in another prompt too, as often as their token in the texts.

        A bank may keep a few rows of a frequent token; each then stands for more tokens of the texts.
        """
        token_ids, prompts = self._bank_rows.token_ids().astype(np.int64), self._bank_rows.distinct_prompts
        placed = {first_row: bank.n_rows for name in self._searched for first_row, bank in self._bank_rows.of(name)}
        searched = np.concatenate([first_row + np.arange(n_rows) for first_row, n_rows in placed.items()])
        row_ids, banks = self._bank_rows.row_ids(self.query_hook_name), self._bank_rows.of(self.query_hook_name)
        n_ids, n_prompts = int(token_ids.max(initial=0)) + 1, int(prompts.max(initial=0)) + 1
        n_rows_of = np.bincount(token_ids[row_ids], minlength=n_ids)
        n_tokens_of = sum(np.bincount(bank.plan.tokens, minlength=n_ids)[:n_ids] for _, bank in banks)
        pairs = np.unique(token_ids[searched] * n_prompts + prompts[searched])
        n_prompts_of = np.bincount(pairs // n_prompts, minlength=n_ids)
        row_ids = row_ids[n_prompts_of[token_ids[row_ids]] > 1]
        # In this order, evenly spaced rows are of frequent and rare tokens in their right shares.
        row_ids = row_ids[np.lexsort((token_ids[row_ids], n_prompts_of[token_ids[row_ids]]))]
        ends = (n_tokens_of / np.maximum(n_rows_of, 1))[token_ids[row_ids]].cumsum()
        n_taken = min(len(row_ids), _REFERENCE_ROWS)
        places = (np.arange(n_taken) + 0.5) / max(n_taken, 1) * ends[-1:]
        return row_ids[ends.searchsorted(places)]

    def _nearest_in_other_prompts(
        self, row_ids: Int[np.ndarray, " n"]
    ) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """For each row whether there is a row of another prompt, and the nearest such row and its hook id."""
        vectors = torch.from_numpy(self._bank_rows.activations(self.query_hook_name, row_ids))
        queries = transform_queries(vectors, self._searches, self._searched, self.query_hook_name, self._device)
        prompts = torch.from_numpy(self._bank_rows.distinct_prompts)
        found = torch.zeros(3, len(row_ids), dtype=torch.int64, device=self._device)
        left, top_k = torch.arange(len(row_ids), device=self._device), _TOP_K
        n_rows = sum(len(part.search) for name in self._searched for part in self._searches[name].parts)
        while len(left):
            units = {name: queries[name][left] for name in queries}
            nearest = search_hook_names(units, self._searches, top_k, self.query_hook_name, is_approximate=self._is_approximate)
            own = prompts[row_ids[left.cpu().numpy()], None]
            is_other = (prompts[nearest.rows.cpu()] != own).to(self._device)
            first = is_other.long().argmax(-1, keepdim=True)
            columns = [is_other, nearest.rows, nearest.hook_ids]
            found[:, left] = torch.stack([column.gather(-1, first)[:, 0].long() for column in columns])
            left = left[~found[0, left].bool()] if top_k < n_rows else left[:0]
            top_k = min(4 * top_k, n_rows)
        return found[0].bool(), found[1], found[2]
