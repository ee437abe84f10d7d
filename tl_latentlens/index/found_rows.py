"""Found rows of queries, and the best of those that several searches found."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class FoundRows:
    """The nearest rows of each query, nearest first; ties by hook order, then row.

    Attributes:
        similarities: Float32, [..., k].
        rows: Rows of the index, int64, [..., k].
        hook_ids: Which of the hook names each row was found in, int64, [..., k].
    """

    similarities: Float[Tensor, "... k"]
    rows: Int[Tensor, "... k"]
    hook_ids: Int[Tensor, "... k"]

    def to(self, device: torch.device) -> "FoundRows":
        """The same on a device."""
        return FoundRows(self.similarities.to(device), self.rows.to(device), self.hook_ids.to(device))

    def at(self, order: Int[Tensor, "... m"]) -> "FoundRows":
        """Some of the rows of each query, by their places."""
        return FoundRows(*(numbers.gather(-1, order) for numbers in vars(self).values()))

    @staticmethod
    def none(shape: Sequence[int], device: torch.device) -> "FoundRows":
        """Places for rows without a row in them: -1, and NaN."""
        missing = torch.full(tuple(shape), -1, device=device)
        return FoundRows(torch.full(tuple(shape), torch.nan, device=device), missing, missing.clone())


def ranked_together(answers: Sequence[FoundRows], top_k: int) -> FoundRows:
    """The nearest rows among those that several searches of different rows found, at most `top_k` of each query."""
    found = _sorted(answers)
    return FoundRows(*(numbers[..., :top_k].contiguous() for numbers in vars(found).values()))


def ranked_together_by_label(answers: Sequence[FoundRows], top_k: int, labels: Int[Tensor, " rows"]) -> FoundRows:
    """The nearest row of each of the `top_k` nearest labels among those that several searches found; -1 and NaN past the last.

    Args:
        answers: The nearest row of each label among the rows of each search, [q, k].
        top_k: Labels of each query.
        labels: The label of each row of the index.
    """
    found = _sorted(answers)
    best = FoundRows.none((len(found.rows), top_k), found.rows.device)
    groups = torch.where(found.rows < 0, -1, labels.to(found.rows.device)[found.rows])
    query, rank, at = first_of_each_group(groups, groups.new_full((len(groups), 1), -2), top_k)
    for chosen, numbers in zip(vars(best).values(), vars(found).values(), strict=True):
        chosen[query, rank] = numbers[query, at]
    return best


def first_of_each_group(
    groups: Int[Tensor, "q depth"], unlike: Int[Tensor, "q unlike"], top_k: int
) -> tuple[Int[Tensor, " found"], Int[Tensor, " found"], Int[Tensor, " found"]]:
    """Query, rank among its groups, and place of the first row of each group that a query does not leave out."""
    ordered, order = groups.sort(dim=-1, stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_new &= ordered >= 0
    for left_out in unlike.unbind(-1):
        is_new &= ordered != left_out[:, None]
    is_first: Bool[Tensor, "q depth"] = torch.zeros_like(is_new).scatter(-1, order, is_new)
    rank = is_first.cumsum(-1) - 1
    query, at = (is_first & (rank < top_k)).nonzero(as_tuple=True)
    return query, rank[query, at], at


def _sorted(answers: Sequence[FoundRows]) -> FoundRows:
    """All rows of each query, nearest first; ties by hook order, then row; places without a row come last."""
    found = FoundRows(*(torch.cat(numbers, -1) for numbers in zip(*(vars(answer).values() for answer in answers), strict=True)))
    found = found.at(found.rows.argsort(dim=-1, stable=True))
    found = found.at(found.hook_ids.argsort(dim=-1, stable=True))
    return found.at(found.similarities.nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True))
