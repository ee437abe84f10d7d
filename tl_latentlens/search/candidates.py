"""Which rows can be among the nearest: cheap scores with a proven error, and only the rows that may reach the k-th best.

Scores of a chunk of rows come in any number type with a bound on their error. Rows are looked at in groups of 16: a group
whose best score, error added, stays below the k-th best similarity known so far is done with. What is left is scored
anew by `search`. `codes` gives such scores from one or two bytes a number.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

AtLeast = Callable[[Int[Tensor, " pairs"], Int[Tensor, " pairs"]], Float[Tensor, " pairs"]]
Reaching = Callable[[Float[Tensor, "groups q"], int], tuple[Tensor, Tensor, Tensor] | None]
GROUP = 16
_CROWD = 4  # times k groups of a chunk that may hold near rows of a query: it pays to raise the threshold first
_WORTH_COMPILING = 1024  # rows of a chunk
LATER = 3  # the threshold is raised again when so many times the rows have been seen


def compiled_loops(device: torch.device, n_rows: int) -> Any:
    """The module of compiled loops where they can be used and are worth the time that compiling takes once, or None."""
    return _compiled() if device.type == "cpu" and n_rows >= _WORTH_COMPILING else None


@cache
def _compiled() -> Any:
    try:
        from tl_latentlens.search import cpu_kernels as compiled
    except ImportError:  # numba is not installed, or not for this NumPy
        return None
    return compiled


class Scratch:
    """Memory that is used again for each chunk: on a CPU, fresh memory costs more than the products that fill it."""

    def __init__(self, device: torch.device) -> None:
        """Start with none."""
        self._device = device
        self._held: dict[torch.dtype, Tensor] = {}

    def __call__(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] tensor with anything in it; the last one of the same dtype is overwritten."""
        if dtype not in self._held or len(self._held[dtype]) < rows * columns:
            self._held[dtype] = torch.empty(rows * columns, dtype=dtype, device=self._device)
        return self._held[dtype][: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class Bounds:
    """What raw scores of a chunk of rows say of similarities to queries: `offset + unit * (scale * (raw ± coded) ± uncoded)`.

    Attributes:
        scale: Of each group of 16 rows, above 0; None: 1.
        coded: Most that the raw scores of a query can be off.
        uncoded: Most that they are off by what does not shrink with the scale.
        unit: What one of `raw * scale` is worth to each query, above 0.
        offset: Added to every similarity of a query.
        rounding: What `raw` may be off besides, as a share of itself and of what it should be; only where the scale is None.
    """

    scale: Float[Tensor, " groups"] | None
    coded: Float[Tensor, " q"]
    uncoded: Float[Tensor, " q"]
    unit: Float[Tensor, " q"]
    offset: Float[Tensor, " q"]
    rounding: float = 0.0

    def least(self, threshold: Float[Tensor, " q"]) -> Float[Tensor, "groups q"] | Float[Tensor, "1 q"]:
        """What `raw` must reach for the similarity to be able to reach a threshold."""
        floor = (threshold - self.offset) / self.unit - self.uncoded
        if self.scale is not None:
            return torch.addr(-self.coded.expand(len(self.scale), -1), 1 / self.scale, floor)
        floor = floor - self.coded
        return torch.where(floor > 0, floor * (1 - self.rounding), floor * (1 + self.rounding))[None]

    def similarity(
        self, raw: Tensor, groups: Int[Tensor, " pairs"], queries: Int[Tensor, " pairs"]
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Similarities of some pairs from their raw scores, and the most that each can be off."""
        raw, unit = raw.float(), self.unit[queries]
        scale = unit if self.scale is None else unit * self.scale[groups]
        error = scale * (self.coded[queries] + self.rounding * raw.abs()) + unit * self.uncoded[queries]
        return self.offset[queries] + scale * raw, error


@dataclass(frozen=True)
class Scores(Bounds):
    """Approximate similarities of a chunk of rows to queries.

    Attributes:
        raw: Any number type; the number of rows is a multiple of 16. The last rows and columns may be made up.
    """

    raw: Int[Tensor, "rows columns"] | Float[Tensor, "rows columns"] = field(kw_only=True)


@dataclass(frozen=True)
class Pairs:
    """Rows and queries that may be near.

    Attributes:
        rows: Row numbers.
        queries: Of each the query.
        middle: What their similarity seems to be.
        reach: The most that it can be.
    """

    rows: Int[Tensor, " pairs"]
    queries: Int[Tensor, " pairs"]
    middle: Float[Tensor, " pairs"]
    reach: Float[Tensor, " pairs"]

    @staticmethod
    def cat(parts: list["Pairs"]) -> "Pairs":
        """All of them, in order."""
        return Pairs(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))

    def where(self, mask: Bool[Tensor, " pairs"]) -> "Pairs":
        """Some of the pairs."""
        return Pairs(self.rows[mask], self.queries[mask], self.middle[mask], self.reach[mask])


class Candidates:
    """The rows that may be among the k nearest of each query, gathered chunk by chunk.

    Attributes:
        k: How many are wanted.
        threshold: A similarity that k rows are known to reach, for each query; -inf while there are fewer.
        count: Number of pairs of a row and a query that are held.
        n_seen: Number of rows that were looked at.
    """

    def __init__(self, k: int, n_queries: int, at_least: AtLeast, device: torch.device) -> None:
        """Start with no candidate; `at_least` gives a sharp lower bound on the similarity of pairs (rows, queries)."""
        self.k, self._at_least = k, at_least
        self.threshold = torch.full((n_queries,), -torch.inf, dtype=torch.float32, device=device)
        self._best = torch.full((n_queries, k), -torch.inf, dtype=torch.float32, device=device)
        self._held: list[Pairs] = []
        self._new: list[Pairs] = []  # held too; none of them has been scored by `at_least`
        self.n_seen = self._raised = 0
        self.count = 0

    def add(self, scores: Scores, first: int, last: int, *, most: float = 1.0, piece: int = 2**16) -> bool:
        """Gather what may reach the threshold among the rows of a chunk.

        Args:
            scores: Of the rows `first` to `last`.
            first: Row number of the chunk's first row.
            last: Row number past the chunk's last row.
            most: Give up, and add nothing, where more than this share of the groups may reach it.
            piece: Groups to look into at once.

        Returns:
            False where it was given up.
        """
        n_groups = len(scores.raw) // GROUP * len(self.threshold)
        most_groups = int(most * n_groups)
        few = min(_CROWD * self.k * len(self.threshold), most_groups)
        all_reach = not self.n_seen and n_groups > few  # nothing is known yet
        pairs = None if all_reach else self._reaching(scores, first, last, few, piece)
        if pairs is None:
            self._raise_by_groups(scores, first, last)
            pairs = self._reaching(scores, first, last, most_groups, piece)
        if pairs is None:
            return False
        self._keep(pairs, last - first)
        return True

    def add_as_made(self, bounds: Bounds, reaching: Reaching, first: int, last: int, *, most: float) -> bool:
        """As `add`, for scores that are looked at as they are made.

        Args:
            bounds: Of the scores of the rows `first` to `last`.
            reaching: Rows, counted from `first` on, and queries whose raw score reaches a least one of each group, and these
                scores; None where there are more than a number of pairs.
            first: Row number of the chunk's first row.
            last: Row number past the chunk's last row.
            most: Give up, and add nothing, where more rows than this may reach the threshold for each group and query.
        """
        least = bounds.least(self.threshold)
        pairs = self._pairs(bounds, reaching(least, int(most * least.numel())), first)
        if pairs is None:
            return False
        self._keep([pairs], last - first)
        return True

    def _keep(self, pairs: list[Pairs], n_rows: int) -> None:
        self._new += pairs
        self.count += sum(len(part.rows) for part in pairs)
        self.n_seen += n_rows
        if self.n_seen > LATER * self._raised:
            self._raise_by_pairs()
            self._raised = self.n_seen

    @staticmethod
    def _pairs(bounds: Bounds, found: tuple[Tensor, Tensor, Tensor] | None, first: int) -> Pairs | None:
        if found is None:
            return None
        rows, queries, raw = found
        middle, error = bounds.similarity(raw, rows // GROUP, queries)
        return Pairs(first + rows, queries, middle, middle + error)

    def _reaching(self, scores: Scores, first: int, last: int, most_groups: int, piece: int) -> list[Pairs] | None:
        """The pairs of a chunk that may reach the threshold; None where they are in more than so many groups."""
        least, n_queries, width = scores.least(self.threshold), len(self.threshold), scores.raw.shape[1]
        loops = compiled_loops(scores.raw.device, last - first)
        if loops is not None:
            n_groups, every = len(scores.raw) // GROUP, (last - first) * n_queries
            room = every if most_groups >= n_groups * n_queries else min(2 * most_groups, every)
            found = loops.reach(scores.raw, least, GROUP if len(least) > 1 else len(scores.raw), last - first, room)
            pairs = self._pairs(scores, found, first)
            return None if pairs is None else [pairs]
        cells = _true_cells(_highest(scores)[:, :n_queries] >= least)
        if len(cells) > most_groups:
            return None
        raw, least, pairs = scores.raw.view(-1), least.expand(-1 if len(least) > 1 else len(scores.raw) // GROUP, -1), []
        in_group = width * torch.arange(GROUP, device=raw.device)
        for cell in cells.split(piece):
            group, query = cell // n_queries, cell % n_queries
            found = raw[(group * GROUP * width + query)[:, None] + in_group]
            hit, member = (found >= least[group, query, None]).nonzero(as_tuple=True)
            rows = first + group[hit] * GROUP + member
            middle, error = scores.similarity(found[hit, member], group[hit], query[hit])
            some = Pairs(rows, query[hit], middle, middle + error)
            pairs.append(some if len(scores.raw) == last - first else some.where(rows < last))
        return pairs

    def take(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Rows and queries of the pairs that may still reach the threshold; they are forgotten here."""
        self._raise_by_pairs()
        held = Pairs.cat(self._held)
        self._held, self.count = [], 0
        kept = held.reach >= self.threshold[held.queries]
        return held.rows[kept], held.queries[kept]

    def raise_to(self, known: Float[Tensor, " q"]) -> None:
        """Take note of similarities that k rows reach."""
        self.threshold = torch.maximum(self.threshold, known)

    def _raise_by_groups(self, scores: Scores, first: int, last: int) -> None:
        """Score the most promising row of the most promising groups: k of them reach the k-th best of those."""
        highest = _highest(scores)[:, : len(self.threshold)]
        if len(highest) < self.k:
            return
        n_queries, width = len(self.threshold), scores.raw.shape[1]
        scaled = highest if scores.scale is None else highest * scores.scale[:, None]
        groups = scaled.T.contiguous().topk(self.k, dim=-1).indices
        queries = torch.arange(n_queries, device=groups.device)[:, None].expand_as(groups)
        in_group = torch.arange(GROUP, device=groups.device)
        at = (groups[..., None] * GROUP + in_group) * width + queries[..., None]
        rows = first + groups * GROUP + scores.raw.view(-1)[at].argmax(-1)
        known = self._at_least(rows.clamp(max=last - 1).flatten(), queries.flatten()).view_as(rows)
        self.raise_to(torch.where(rows < last, known, -torch.inf).amin(-1))

    def _raise_by_pairs(self) -> None:
        """Score those of the new pairs that would raise the threshold if their scores were exact."""
        if not self._new:
            return
        n_queries = len(self.threshold)
        bar = torch.where(self.threshold == -torch.inf, torch.inf, self.threshold)  # fewer than k raise nothing
        new = Pairs.cat(self._new)
        self._held.append(new)
        self._new = []
        promising = new.where(new.middle >= bar[new.queries])
        known = torch.cat([self._best.flatten(), self._at_least(promising.rows, promising.queries)])
        of = torch.cat([torch.arange(n_queries, device=known.device).repeat_interleave(self.k), promising.queries])
        counts = torch.bincount(of, minlength=n_queries)
        places = (counts.cumsum(0) - counts)[:, None] + torch.arange(self.k, device=known.device)
        self._best = known[by_query(known, of)[places]]
        self.raise_to(self._best[:, -1])


def _highest(scores: Scores) -> Tensor:
    """The best score of each group."""
    return scores.raw.unflatten(0, (-1, GROUP)).amax(1)


def _true_cells(mask: Bool[Tensor, "rows columns"]) -> Int[Tensor, " cells"]:
    """Where a mask that is mostly false is true, counted row by row; eight cells are looked at at once."""
    flat = mask.flatten()
    words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    word = words.nonzero()[:, 0]
    at, cell = words[word].view(torch.bool).view(-1, 8).nonzero(as_tuple=True)
    return word[at] * 8 + cell


def by_query(scores: Float[Tensor, " pairs"], of: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """The order that sorts pairs by query, then from the highest score down; equal ones stay as they stand."""
    bits = (scores + 0.0).view(torch.int32).long()  # no -0.0; of floats below zero the bits count backwards
    return ((of << 33) - torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)).argsort(stable=True)  # one sort in place of two


def kth(scores: Float[Tensor, " pairs"], of: Int[Tensor, " pairs"], k: int, n_queries: int) -> Float[Tensor, " q"]:
    """The k-th highest score of each query; -inf where it has fewer."""
    counts = torch.bincount(of, minlength=n_queries)
    last = counts.cumsum(0) - counts + k - 1
    ordered = torch.nn.functional.pad(scores[by_query(scores, of)], (0, 1), value=-torch.inf)
    return torch.where(counts >= k, ordered[last.clamp(max=len(scores))], -torch.inf)
