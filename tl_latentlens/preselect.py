"""Which rows can be among the nearest: cheap scores with a proven error, and only the rows that may reach the k-th best.

Scores of a chunk of rows come in any number type with a bound on their error. Rows are looked at in groups of 16: a group
whose best score, error added, stays below the k-th best similarity known so far is done with. What is left is scored
anew by `search`. `Int8Codes` gives such scores from one byte a number.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

AtLeast = Callable[[Int[Tensor, " pairs"], Int[Tensor, " pairs"]], Float[Tensor, " pairs"]]
GROUP = 16
_SLACK = 4e-6  # float32 rounding of the codes' scales, lengths and products, all at most about 1
_MANY = 2  # group hits a query in a chunk: from there on it pays to raise the threshold first,
_LATER = 1.5  # and again when that many times as many rows have been seen


def int8_is_fast(device: torch.device) -> bool:
    """True where integer products beat float ones: NVIDIA GPUs, and CPUs with VNNI or AMX."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    return device.type == "cuda"


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
class Scores:
    """Approximate similarities of a chunk of rows to queries: `offset + unit * (raw * scale ± error)`.

    Attributes:
        raw: Any number type; the number of rows is a multiple of 16, the last ones may be made up.
        scale: Of each group of 16 rows.
        error: Most that a row of a group can be off, in the same unit.
        unit: What one of `raw * scale` is worth to each query.
        offset: Added to every similarity of a query.
    """

    raw: Int[Tensor, "rows q"] | Float[Tensor, "rows q"]
    scale: Float[Tensor, "#groups 1"]
    error: Float[Tensor, "#groups q"]
    unit: Float[Tensor, " q"]
    offset: Float[Tensor, " q"]


@dataclass(frozen=True)
class QueryCodes:
    """Queries rounded to int8: `query = size * codes + rest`."""

    codes: Int[Tensor, "d q"]
    size: Float[Tensor, " q"]
    length: Float[Tensor, " q"]
    rest: Float[Tensor, " q"]
    offset: Float[Tensor, " q"]


class Int8Codes:
    """Rows rounded to int8, after their mean is taken away, with one scale for each 16 rows.

    A row is `mean + scale * codes + rest`, a query `size * codes + rest`. With r the row without the mean, the product of
    the two integer vectors, times both scales, misses query · r by at most |query's rest| |r| + |query's codes| |row's rest|
    (Cauchy-Schwarz). The lengths on the right are measured, not estimated.
    """

    def __init__(self, chunks: Iterable[Float[Tensor, "rows d"]], n: int, mean: Float[Tensor, " d"]) -> None:
        """Encode rows.

        Args:
            chunks: The rows as they are compared, of length 1 or 0, float32, a few at a time; each chunk but the last has
                a multiple of 16.
            n: Number of rows.
            mean: What to take away from every row; any vector is right, the rows' mean is best.
        """
        device, padded, wide = mean.device, _up(n, GROUP), _up(len(mean), 8)  # CUDA multiplies widths of multiples of 8
        self.mean = mean.float()
        self._codes = torch.zeros((padded, wide), dtype=torch.int8, device=device)
        self._scale = torch.empty(padded // GROUP, device=device)
        self._length, self._rest = torch.empty_like(self._scale), torch.empty_like(self._scale)
        first = 0
        for chunk in chunks:
            rows = torch.nn.functional.pad(chunk - self.mean, (0, 0, 0, -len(chunk) % GROUP)).unflatten(0, (-1, GROUP))
            scale = rows.abs().amax((1, 2)).clamp(min=1e-30) / 127
            codes = (rows / scale[:, None, None]).round_()
            groups = slice(first // GROUP, first // GROUP + len(rows))
            self._codes[first : first + len(rows) * GROUP, : len(mean)] = codes.flatten(0, 1).to(torch.int8)
            self._scale[groups] = scale
            self._length[groups] = rows.norm(dim=-1).amax(1)
            self._rest[groups] = (rows - codes * scale[:, None, None]).norm(dim=-1).amax(1)
            first += len(rows) * GROUP

    @staticmethod
    def bytes(n: int, d: int) -> int:
        """Memory that the codes of n rows take."""
        return _up(n, GROUP) * (_up(d, 8) + 1)

    def encode(self, queries: Float[Tensor, "q d"]) -> QueryCodes:
        """Round unit queries."""
        size = queries.abs().amax(-1) / 127
        codes = (queries / size[:, None]).round_()
        rest = (queries - codes * size[:, None]).norm(dim=-1)
        length = codes.norm(dim=-1)
        offset = (queries.double() @ self.mean.double()).float()
        # CUDA multiplies by a multiple of 8 columns.
        wide = torch.nn.functional.pad(codes, (0, self._codes.shape[1] - codes.shape[1], 0, -len(codes) % 8))
        return QueryCodes(wide.to(torch.int8).T, size, length, rest / size, offset)

    def scores(self, queries: QueryCodes, first: int, last: int, scratch: Scratch) -> Scores:
        """Scores of rows `first` (a multiple of 16) to `last`, in scratch memory."""
        groups = slice(first // GROUP, _up(last, GROUP) // GROUP)
        codes = self._codes[first : _up(last, GROUP)]
        raw = scratch(len(codes), queries.codes.shape[1], torch.int32)
        torch._int_mm(codes, queries.codes, out=raw)  # pyright: ignore[reportPrivateImportUsage]
        error = self._length[groups, None] * queries.rest + self._rest[groups, None] * queries.length + _SLACK / queries.size
        return Scores(raw[:, : len(queries.size)], self._scale[groups, None], error, queries.size, queries.offset)


class Candidates:
    """The rows that may be among the k nearest of each query, gathered chunk by chunk.

    Attributes:
        threshold: A similarity that k rows are known to reach, for each query; -inf while there are fewer.
        rows: Row numbers of the pairs found, of which `queries` holds the query and `reach` the most their similarity can be.
    """

    def __init__(self, k: int, n_queries: int, at_least: AtLeast, device: torch.device) -> None:
        """Start with no candidate; `at_least` gives a sharp lower bound on the similarity of pairs (rows, queries)."""
        self._k, self._at_least = k, at_least
        self.threshold = torch.full((n_queries,), -torch.inf, device=device)
        self._best = torch.full((k, n_queries), -torch.inf, device=device)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._raised = 0
        self.count = 0

    def add(
        self,
        scores: Scores,
        first: int,
        last: int,
        *,
        most: float = 1.0,
        piece: int = 2**16,
    ) -> bool:
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
        members = scores.raw.unflatten(0, (-1, GROUP))
        highest = members.amax(1) * scores.scale
        n_queries = highest.shape[1]
        reach = highest + scores.error
        hits = reach >= (self.threshold - scores.offset) / scores.unit
        n_hits = int(hits.count_nonzero())
        due = n_hits > _MANY * n_queries and first >= _LATER * self._raised
        if due or (n_hits > most * hits.numel() and first >= self._raised):  # a row must not count twice
            self._raise_threshold(members, highest, first, last)
            hits = reach >= (self.threshold - scores.offset) / scores.unit
            n_hits = int(hits.count_nonzero())
        if n_hits > most * hits.numel():
            return False
        groups, queries = hits.nonzero(as_tuple=True)
        for group, query in zip(groups.split(piece), queries.split(piece), strict=True):
            error = scores.error.expand_as(reach)[group, query]
            value = members[group, :, query] * scores.scale.expand(len(reach), 1)[group] + error[:, None]
            value = value * scores.unit[query, None] + scores.offset[query, None]
            hit, member = (value >= self.threshold[query, None]).nonzero(as_tuple=True)
            rows = first + group[hit] * GROUP + member
            real = rows < last
            self._parts.append((rows[real], query[hit][real], value[hit, member][real]))
            self.count += int(real.sum())
        return True

    def take(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Rows and queries of the pairs that may still reach the threshold; they are forgotten here."""
        rows, queries, reach = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts, self.count = [], 0
        kept = reach >= self.threshold[queries]
        rows, queries, reach = rows[kept], queries[kept], reach[kept]
        foremost = reach >= kth(reach, queries, self._k, len(self.threshold))[queries]
        known = self._at_least(rows[foremost], queries[foremost])
        self.threshold = torch.maximum(self.threshold, kth(known, queries[foremost], self._k, len(self.threshold)))
        kept = reach >= self.threshold[queries]
        return rows[kept], queries[kept]

    def _raise_threshold(self, members: Tensor, highest: Tensor, first: int, last: int) -> None:
        """Score the most promising row of the most promising groups exactly: k of them reach the k-th best of those."""
        groups = highest.T.contiguous().topk(min(self._k, len(highest)), dim=-1).indices
        queries = torch.arange(len(groups), device=groups.device)[:, None].expand_as(groups)
        rows = first + groups * GROUP + members[groups, :, queries].argmax(-1)
        known = self._at_least(rows.clamp(max=last - 1).flatten(), queries.flatten()).view_as(rows)
        known = torch.where(rows < last, known, -torch.inf)
        self._raised = last
        self._best = torch.cat([self._best, known.T]).topk(self._k, dim=0).values
        self.threshold = torch.maximum(self.threshold, self._best[-1])


def by_query(scores: Float[Tensor, " pairs"], of: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """The order that sorts pairs by query, then from the highest score down; equal ones stay as they stand."""
    order = scores.argsort(descending=True, stable=True)
    return order[of[order].argsort(stable=True)]


def kth(scores: Float[Tensor, " pairs"], of: Int[Tensor, " pairs"], k: int, n_queries: int) -> Float[Tensor, " q"]:
    """The k-th highest score of each query; -inf where it has fewer."""
    counts = torch.bincount(of, minlength=n_queries)
    last = counts.cumsum(0) - counts + k - 1
    ordered = torch.nn.functional.pad(scores[by_query(scores, of)], (0, 1), value=-torch.inf)
    return torch.where(counts >= k, ordered[last.clamp(max=len(scores))], -torch.inf)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
