"""As many rows for each query as can be told beforehand, those of the highest scores.

`preselect` keeps what may be near, however much that is, and asks the device at every step how much it was. On a GPU those
questions cost more than the answers: here every shape is known, and one question at the end tells whether it was enough.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

WIDE = 32  # rows of a group whose best score is looked at


@dataclass(frozen=True)
class Shortlist:
    """The rows that may be nearest to each query: no other row has a higher score than the lowest of them.

    Attributes:
        raw: The score of each.
        rows: Row numbers.
    """

    raw: Float[Tensor, "q size"]
    rows: Int[Tensor, "q size"]

    @staticmethod
    def of(raw: Float[Tensor, "rows columns"], n_queries: int, first: int, last: int, size: int) -> "Shortlist":
        """Of the rows `first` to `last`, at most `size`.

        The groups of 32 with the highest scores are looked into, as many as rows are wanted: the best rows are in them.

        Args:
            raw: Scores, in whole groups, with -inf behind the last row; columns past the queries are made up.
            n_queries: How many.
            first: Number of the first row.
            last: Number past the last one.
            size: How many rows to list.
        """
        highest = raw.unflatten(0, (-1, WIDE)).amax(1)[:, :n_queries].T
        groups = highest.topk(min(size, highest.shape[1]), dim=-1, sorted=False).indices
        rows = (groups[..., None] * WIDE + torch.arange(WIDE, device=groups.device)).flatten(1)
        best = raw[:, :n_queries].T.gather(1, rows).topk(min(size, last - first), dim=-1, sorted=False)
        return Shortlist(best.values, first + rows.gather(1, best.indices))

    def merged(self, other: "Shortlist", size: int) -> "Shortlist":
        """The best of both, at most `size`."""
        raw, rows = torch.cat([self.raw, other.raw], 1), torch.cat([self.rows, other.rows], 1)
        best = raw.topk(min(size, raw.shape[1]), dim=-1, sorted=False)
        return Shortlist(best.values, rows.gather(1, best.indices))
