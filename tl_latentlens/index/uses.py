"""Whether a found row is the right use of its token: how near the query comes to it, among the bank's other uses."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.index.cross_layer import centered_rows
from tl_latentlens.index.hook_name_search import HookNameSearch
from tl_latentlens.index.rows import BankRows

_MAX_USES = 200  # uses of a token that a query is compared with
_MIN_USES = 5  # Fewer say nothing.
_MAX_NUMBERS = 2**22  # numbers of the vectors that are compared at once
_COSINE_ERROR = 1e-6  # a cosine of vectors that were rounded to float32 is off by about this


class TokenUses:
    """The uses of each token at one hook name; see `ContextualIndex.use_chances`."""

    def __init__(self, query_hook_name: str, searches: Mapping[str, HookNameSearch], bank_rows: BankRows) -> None:
        """Sort the rows of a hook name by token.

        Args:
            query_hook_name: The hook name that the activations come from, a loaded one.
            searches: The loaded hook names.
            bank_rows: Their rows.
        """
        self._search, self._searches = searches[query_hook_name], searches
        self._token_ids, self._prompts = bank_rows.token_ids(), bank_rows.distinct_prompts
        rows = bank_rows.row_ids(query_hook_name)
        self._rows = rows[np.argsort(self._token_ids[rows], kind="stable")]
        self._sorted_ids = self._token_ids[self._rows]

    def chances(
        self,
        vectors: Float[Tensor, "n d"],
        rows: Int[Tensor, " n"],
        hook_ids: Int[Tensor, " n"],
        token_ids: Int[np.ndarray, " n"],
    ) -> Float[Tensor, " n"]:
        """The share of other uses of each activation's token that are at least as near to its nearest row, float32; or NaN.

        Args:
            vectors: The activations.
            rows: The nearest row of each.
            hook_ids: The hook name of that row.
            token_ids: The token of each.
        """
        chances = torch.full((len(rows),), torch.nan, device=rows.device)
        queries, uses = self._pairs(rows.cpu().numpy(), token_ids)
        starts = np.flatnonzero(np.diff(queries, prepend=-1))  # where the uses of a query begin
        ends = np.append(starts[1:], len(queries))
        n_at_once = max(1, _MAX_NUMBERS // (_MAX_USES * vectors.shape[-1]))
        for first in range(0, len(starts), n_at_once):
            span = slice(starts[first], ends[min(first + n_at_once, len(starts)) - 1])
            chances_of, of = self._chances(vectors, rows, hook_ids, queries[span], uses[span])
            chances[of] = chances_of
        return chances

    def _pairs(
        self, rows: Int[np.ndarray, " n"], token_ids: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
        """Queries whose nearest row is a use of their token, each with up to 200 rows that are other uses, evenly spaced."""
        first, end = (np.searchsorted(self._sorted_ids, token_ids, side) for side in ("left", "right"))
        n_uses = np.where(self._token_ids[rows] == token_ids, end - first, 0)
        n_taken = np.minimum(n_uses, _MAX_USES)
        queries = np.repeat(np.arange(len(rows)), n_taken)
        number = np.arange(len(queries)) - np.repeat(np.cumsum(n_taken) - n_taken, n_taken)  # counted from 0 for each query
        uses = self._rows[first[queries] + number * n_uses[queries] // n_taken[queries]]
        is_other = self._prompts[uses] != self._prompts[rows[queries]]
        queries, uses = queries[is_other], uses[is_other]
        has_enough = np.bincount(queries, minlength=len(rows)) >= _MIN_USES
        return queries[has_enough[queries]], uses[has_enough[queries]]

    def _chances(
        self,
        vectors: Float[Tensor, "n d"],
        rows: Int[Tensor, " n"],
        hook_ids: Int[Tensor, " n"],
        queries: Int[np.ndarray, " pairs"],
        uses: Int[np.ndarray, " pairs"],
    ) -> tuple[Float[Tensor, " some"], Int[Tensor, " some"]]:
        """The chance of some queries, and which they are."""
        device = rows.device
        of, query_of_pair = np.unique(queries, return_inverse=True)
        use_rows, use_of_pair = np.unique(uses, return_inverse=True)
        of, query_of_pair, use_rows, use_of_pair = (
            torch.from_numpy(numbers).to(device) for numbers in (of, query_of_pair, use_rows, use_of_pair)
        )
        found = centered_rows(self._searches, rows[of], hook_ids[of], self._search.d)
        similarities = (self._search.centered_activations(vectors[of.to(vectors.device)]) * found).sum(-1)
        of_uses = (self._search.centered_rows(use_rows)[use_of_pair] * found[query_of_pair]).sum(-1)
        is_as_near = of_uses >= similarities[query_of_pair] - _COSINE_ERROR
        n_as_near = torch.bincount(query_of_pair, is_as_near.double(), minlength=len(of))
        n_uses = torch.bincount(query_of_pair, minlength=len(of))
        return ((1 + n_as_near) / (1 + n_uses)).float(), of
