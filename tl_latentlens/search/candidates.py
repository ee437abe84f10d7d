"""Candidates (step 2 of a search): the rows of a chunk whose similarity may reach the threshold.

Rows are compared in groups of 16: a group whose best coarse score, error bound included, is below the threshold has none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.search.backend import cpu_kernels
from tl_latentlens.search.chunks import GROUP_ROWS
from tl_latentlens.search.error_bounds import CoarseScores, ErrorBound, RawPairs
from tl_latentlens.search.threshold import Threshold, best_of_groups

# Where more than k times this many groups of a chunk may hold candidates, it pays to raise the threshold first.
_FEW_GROUPS_PER_K = 4

SelectFused = Callable[[Float[Tensor, "groups q"], int], RawPairs | None]


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs of a row and a query that may be near: the output of step 2.

    Attributes:
        row_ids: Row of each pair.
        query_ids: Query of each pair.
        estimate: Estimated similarity of each pair.
        upper_bound: The most that its similarity can be.
    """

    row_ids: Int[Tensor, " pairs"]
    query_ids: Int[Tensor, " pairs"]
    estimate: Float[Tensor, " pairs"]
    upper_bound: Float[Tensor, " pairs"]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.row_ids)

    @staticmethod
    def cat(parts: list["CandidatePairs"]) -> "CandidatePairs":
        """All of them, in order."""
        return CandidatePairs(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))

    def where(self, mask: Bool[Tensor, " pairs"]) -> "CandidatePairs":
        """The pairs for which the mask is true."""
        return CandidatePairs(self.row_ids[mask], self.query_ids[mask], self.estimate[mask], self.upper_bound[mask])


class HeldPairs:
    """Candidates that wait to be re-ranked.

    Attributes:
        n_pairs: How many there are.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._new: list[CandidatePairs] = []  # none of these has raised the threshold yet
        self._old: list[CandidatePairs] = []
        self.n_pairs = 0

    def add(self, pairs: list[CandidatePairs]) -> None:
        """Hold more pairs."""
        self._new += pairs
        self.n_pairs += sum(map(len, pairs))

    def raise_threshold(self, threshold: Threshold) -> None:
        """Raise a threshold with the pairs that were added since the last time."""
        if self._new:
            pairs = CandidatePairs.cat(self._new)
            self._old.append(pairs)
            self._new = []
            could_raise = threshold.could_raise(pairs.estimate, pairs.query_ids)
            threshold.raise_from_pairs(pairs.row_ids[could_raise], pairs.query_ids[could_raise])

    def take(self, threshold: Threshold) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Rows and queries of the pairs that may still reach a threshold, which they raise first; none is held any more."""
        self.raise_threshold(threshold)
        pairs = CandidatePairs.cat(self._old)
        self._old, self.n_pairs = [], 0
        may_reach = pairs.upper_bound >= threshold.values[pairs.query_ids]
        return pairs.row_ids[may_reach], pairs.query_ids[may_reach]


def select_pairs(
    scores: CoarseScores, threshold: Threshold, *, max_share: float = 1.0, groups_per_step: int = 2**16
) -> list[CandidatePairs] | None:
    """The pairs of a chunk that may reach the threshold, in one or more pieces.

    Args:
        scores: Coarse scores of the chunk.
        threshold: Raised first where too many pairs reach it, or nothing is known yet.
        max_share: Give up where more than this share of the (group, query) cells may hold candidates.
        groups_per_step: Cells to look into at once.

    Returns:
        None where there are too many.
    """
    n_cells = len(scores.raw) // GROUP_ROWS * len(threshold)
    max_cells = int(max_share * n_cells)
    n_few = min(_FEW_GROUPS_PER_K * threshold.k * len(threshold), max_cells)
    is_first = not threshold.n_rows_seen and n_cells > n_few
    pairs = None if is_first else _pairs_above(scores, threshold.values, n_few, groups_per_step)
    if pairs is None:
        threshold.raise_from_groups(scores)
        pairs = _pairs_above(scores, threshold.values, max_cells, groups_per_step)
    return pairs


def select_fused(
    bound: ErrorBound, select: SelectFused, first_row: int, threshold: Threshold, *, max_share: float
) -> list[CandidatePairs] | None:
    """The pairs of a chunk that may reach the threshold, from a kernel that selects scores while it makes them.

    Args:
        bound: How the raw scores bound similarities.
        select: Gives rows of the chunk, queries and raw scores that reach the least raw score of each group and query; None
            where there are more than a number of pairs.
        first_row: Number of the chunk's first row.
        threshold: What similarities must reach.
        max_share: Give up where there are more pairs than this share of the (group, query) cells.
    """
    min_raw = bound.min_raw_score(threshold.values)
    raw_pairs = select(min_raw, int(max_share * min_raw.numel()))
    return None if raw_pairs is None else [_as_candidates(bound, first_row, raw_pairs)]


def _as_candidates(bound: ErrorBound, first_row: int, pairs: RawPairs) -> CandidatePairs:
    estimate, error = bound.estimate(pairs.raw, pairs.rows // GROUP_ROWS, pairs.query_ids)
    return CandidatePairs(first_row + pairs.rows, pairs.query_ids, estimate, estimate + error)


def _pairs_above(
    scores: CoarseScores, threshold: Float[Tensor, " q"], max_cells: int, groups_per_step: int
) -> list[CandidatePairs] | None:
    """The pairs of a chunk that may reach the threshold; None where they are in more than `max_cells` cells."""
    raw, bound, n_queries = scores.raw, scores.bound, len(threshold)
    min_raw = bound.min_raw_score(threshold)
    kernels = cpu_kernels(raw.device, scores.n_rows)
    if kernels is not None:
        n_pairs = scores.n_rows * n_queries
        max_pairs = n_pairs if max_cells >= len(raw) // GROUP_ROWS * n_queries else min(2 * max_cells, n_pairs)
        group_rows = GROUP_ROWS if len(min_raw) > 1 else len(raw)
        raw_pairs = kernels.pairs_above(raw, min_raw, group_rows, scores.n_rows, max_pairs)
        return None if raw_pairs is None else [_as_candidates(bound, scores.first_row, raw_pairs)]
    cells = _true_cells(best_of_groups(scores)[:, :n_queries] >= min_raw)
    if len(cells) > max_cells:
        return None
    min_raw = min_raw.expand(-1 if len(min_raw) > 1 else len(raw) // GROUP_ROWS, -1)
    return [_pairs_in_cells(scores, min_raw, step) for step in cells.split(groups_per_step)]


def _pairs_in_cells(scores: CoarseScores, min_raw: Float[Tensor, "groups q"], cells: Int[Tensor, " cells"]) -> CandidatePairs:
    """The pairs that reach the least raw score in some (group, query) cells, counted row by row."""
    n_queries, width = min_raw.shape[1], scores.raw.shape[1]
    group_ids, query_ids = cells // n_queries, cells % n_queries
    in_group = width * torch.arange(GROUP_ROWS, device=cells.device)
    raw = scores.raw.view(-1)[(group_ids * GROUP_ROWS * width + query_ids)[:, None] + in_group]
    hit, member = (raw >= min_raw[group_ids, query_ids, None]).nonzero(as_tuple=True)
    rows = group_ids[hit] * GROUP_ROWS + member
    pairs = _as_candidates(scores.bound, scores.first_row, RawPairs(rows, query_ids[hit], raw[hit, member]))
    return pairs if len(scores.raw) == scores.n_rows else pairs.where(rows < scores.n_rows)


def _true_cells(mask: Bool[Tensor, "rows columns"]) -> Int[Tensor, " cells"]:
    """Places, counted row by row, where a mask that is mostly false is true; eight cells are looked at together."""
    flat = mask.flatten()
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    word = words.nonzero()[:, 0]
    place, cell = words[word].view(torch.bool).view(-1, 8).nonzero(as_tuple=True)
    return word[place] * 8 + cell
