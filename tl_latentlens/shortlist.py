"""As many rows for each query as can be told beforehand, and the most that any other row can reach.

`preselect` keeps what may be near, however much that is, and asks the device at every step how much it was. On a GPU those
questions cost more than the answers: here every shape is known, and one question at the end tells whether it was enough.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.preselect import Scores

WIDE = 32  # rows of a group whose best score is looked at


@dataclass(frozen=True)
class Shortlist:
    """The rows that may be nearest to each query.

    Attributes:
        reach: The most that the similarity of each can be.
        rows: Row numbers.
        left: The most that the similarity of any other row can be; -inf where there is none.
    """

    reach: Float[Tensor, "q size"]
    rows: Int[Tensor, "q size"]
    left: Float[Tensor, " q"]

    @staticmethod
    def of(scores: Scores, first: int, last: int, size: int) -> "Shortlist":
        """Of the rows `first` to `last`, at most `size`.

        The groups of 32 with the highest scores are looked into, as many as rows are wanted: the best rows are in them.

        Args:
            scores: Without scales; whole groups, with -inf behind the last row.
            first: Number of the first row.
            last: Number past the last one.
            size: How many.
        """
        by_query = scores.raw[:, : len(scores.unit)].T
        highest = scores.raw.unflatten(0, (-1, WIDE)).amax(1)[:, : len(scores.unit)].T
        groups = highest.topk(min(size, highest.shape[1]), dim=-1, sorted=False)
        rows = (groups.indices[..., None] * WIDE + torch.arange(WIDE, device=groups.indices.device)).flatten(1)
        raw = by_query.gather(1, rows)
        best = raw.topk(min(size, last - first), dim=-1, sorted=False)
        left = []
        if groups.values.shape[1] < highest.shape[1]:
            left.append(groups.values.amin(-1, keepdim=True))
        if best.values.shape[1] < min(raw.shape[1], last - first):
            left.append(best.values.amin(-1, keepdim=True))
        reach, others = scores.reach(torch.cat([best.values, *left], 1)).tensor_split([best.values.shape[1]], 1)
        most = others.amax(1) if left else torch.full_like(reach[:, 0], -torch.inf)
        return Shortlist(reach, first + rows.gather(1, best.indices), most)

    def merged(self, other: "Shortlist", size: int) -> "Shortlist":
        """The best of both, at most `size`."""
        reach, rows = torch.cat([self.reach, other.reach], 1), torch.cat([self.rows, other.rows], 1)
        best = reach.topk(min(size, reach.shape[1]), dim=-1, sorted=False)
        left = torch.maximum(self.left, other.left)
        if reach.shape[1] > size:
            left = torch.maximum(left, best.values.amin(-1))
        return Shortlist(best.values, rows.gather(1, best.indices), left)
