"""Which rows can be among the nearest: cheap scores with a proven error, and only the rows that may reach the k-th best.

Scores of a chunk of rows come in any number type with a bound on their error. Rows are looked at in groups of 16: a group
whose best score, error added, stays below the k-th best similarity known so far is done with. What is left is scored
anew by `search`. `Int8Codes` gives such scores from one byte a number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

AtLeast = Callable[[Int[Tensor, " pairs"], Int[Tensor, " pairs"]], Float[Tensor, " pairs"]]
GROUP = 16
_SLACK = 4e-6  # float32 rounding of the codes' scales, lengths and products, all at most about 1
_MANY = 2  # group hits a query in a chunk: from there on it pays to raise the threshold first,
_LATER = 2  # and again when so many times the rows have been seen


def int8_is_fast(device: torch.device) -> bool:
    """True where integer products beat float ones: NVIDIA GPUs, and CPUs with VNNI or AMX."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_vnni_supported", bool)()
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
    """Approximate similarities of a chunk of rows to queries: `offset + unit * (scale * (raw ± coded) ± uncoded)`.

    Attributes:
        raw: Any number type; the number of rows is a multiple of 16, the last ones may be made up.
        scale: Of each group of 16 rows, above 0.
        coded: Most that the raw scores of a query can be off.
        uncoded: Most that they are off by what does not shrink with the scale.
        unit: What one of `raw * scale` is worth to each query, above 0.
        offset: Added to every similarity of a query.
    """

    raw: Int[Tensor, "rows q"] | Float[Tensor, "rows q"]
    scale: Float[Tensor, " groups"]
    coded: Float[Tensor, " q"]
    uncoded: Float[Tensor, " q"]
    unit: Float[Tensor, " q"]
    offset: Float[Tensor, " q"]

    def least(self, threshold: Float[Tensor, " q"]) -> Float[Tensor, "groups q"]:
        """What `raw` must reach for the similarity to be able to reach a threshold."""
        floor = (threshold - self.offset) / self.unit - self.uncoded
        return torch.addr(-self.coded.expand(len(self.scale), -1), 1 / self.scale, floor)

    def reach(self, raw: Tensor, groups: Int[Tensor, " pairs"], queries: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """The most that the similarity of some pairs can be, from their raw scores."""
        most = self.scale[groups] * (raw + self.coded[queries]) + self.uncoded[queries]
        return self.offset[queries] + self.unit[queries] * most


@dataclass(frozen=True)
class QueryCodes:
    """Queries rounded to int8: `query = size * (codes + rest)`.

    Attributes:
        codes: Rounded up to sizes that CUDA multiplies.
        size: What one of a query's numbers is worth.
        length: Length of the codes.
        rest: Length of the rest.
        offset: Product with the rows' mean.
    """

    codes: Int[Tensor, "d q"]
    size: Float[Tensor, " q"]
    length: Float[Tensor, " q"]
    rest: Float[Tensor, " q"]
    offset: Float[Tensor, " q"]


class Int8Codes:
    """Rows rounded to int8, after their mean is taken away, with one scale for each 16 rows.

    A row is `mean + scale * (codes + rest)`, a query `size * (codes + rest)`. With r the row without the mean, the product of
    the two integer vectors, times both scales, misses query · r by at most size |query's rest| |r| + size scale
    |query's codes| |row's rest| (Cauchy-Schwarz). The lengths are measured, not estimated: the largest of a chunk's rows.
    """

    def __init__(self, n: int, mean: Float[Tensor, " d"]) -> None:
        """Make room; `put` encodes the rows.

        Args:
            n: Number of rows.
            mean: What to take away from every row; any vector is right, the rows' mean is best.
        """
        device, padded, wide = mean.device, _up(n, GROUP), _up(len(mean), 8)  # CUDA multiplies sizes that are multiples of 8
        self.mean = mean.float()
        self._codes = torch.zeros((padded + GROUP, wide), dtype=torch.int8, device=device)
        self._scale = torch.empty(padded // GROUP, device=device)
        self._length, self._rest = torch.empty_like(self._scale), torch.empty_like(self._scale)

    def put(self, first: int, rows: Float[Tensor, "rows d"]) -> None:
        """Encode the rows from `first` (a multiple of 16) on: as they are compared, of length 1 or 0, float32."""
        rows = torch.nn.functional.pad(rows - self.mean, (0, 0, 0, -len(rows) % GROUP))
        grouped = rows.unflatten(0, (-1, GROUP))
        scale = grouped.abs().amax((1, 2)).clamp(min=1e-30) / 127
        codes = (grouped / scale[:, None, None]).round_()
        groups = slice(first // GROUP, first // GROUP + len(scale))
        self._codes[first : first + len(rows), : len(self.mean)] = codes.flatten(0, 1).to(torch.int8)
        self._scale[groups] = scale
        self._length[groups] = grouped.norm(dim=-1).amax(1)
        self._rest[groups] = (grouped / scale[:, None, None] - codes).norm(dim=-1).amax(1)

    @staticmethod
    def bytes(n: int, d: int) -> int:
        """Memory that the codes of n rows take."""
        return _up(n, GROUP) * (_up(d, 8) + 1)

    def encode(self, queries: Float[Tensor, "q d"]) -> QueryCodes:
        """Round unit queries."""
        size = queries.abs().amax(-1) / 127
        codes = (queries / size[:, None]).round_()
        rest = (queries - codes * size[:, None]).norm(dim=-1)
        offset = (queries.double() @ self.mean.double()).float()
        wide = torch.nn.functional.pad(codes, (0, self._codes.shape[1] - codes.shape[1], 0, -len(codes) % 8))
        return QueryCodes(wide.to(torch.int8).T, size, codes.norm(dim=-1), rest / size, offset)

    def scores(self, queries: QueryCodes, first: int, last: int, scratch: Scratch) -> Scores:
        """Scores of rows `first` (a multiple of 16) to `last`, in scratch memory."""
        groups = slice(first // GROUP, _up(last, GROUP) // GROUP)
        codes = self._codes[first : max(_up(last, GROUP), first + 2 * GROUP)]  # CUDA multiplies more than 16 rows
        raw = scratch(len(codes), queries.codes.shape[1], torch.int32)
        torch._int_mm(codes, queries.codes, out=raw)  # pyright: ignore[reportPrivateImportUsage]
        raw = raw[: _up(last - first, GROUP), : len(queries.size)]
        coded = self._rest[groups].max() * queries.length
        uncoded = self._length[groups].max() * queries.rest + _SLACK / queries.size
        return Scores(raw, self._scale[groups], coded, uncoded, queries.size, queries.offset)


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
        highest = members.amax(1)
        n_groups, n_queries = highest.shape
        least = scores.least(self.threshold)
        groups, queries = (highest >= least).nonzero(as_tuple=True)
        many = most * n_groups * n_queries
        due = len(groups) > _MANY * n_queries and first >= _LATER * self._raised
        if due or (len(groups) > many and first >= self._raised):  # a row must not count twice
            self._raise_threshold(members, highest * scores.scale[:, None], first, last)
            least = scores.least(self.threshold)
            groups, queries = (highest >= least).nonzero(as_tuple=True)
        if len(groups) > many:
            return False
        for group, query in zip(groups.split(piece), queries.split(piece), strict=True):
            raw = members[group, :, query]
            hit, member = (raw >= least[group, query, None]).nonzero(as_tuple=True)
            group, query, raw = group[hit], query[hit], raw[hit, member]
            rows = first + group * GROUP + member
            real = rows < last
            part = rows[real], query[real], scores.reach(raw, group, query)[real]
            self._parts.append(part)
            self.count += len(part[0])
        return True

    def take(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Rows and queries of the pairs that may still reach the threshold; they are forgotten here."""
        rows, queries, reach = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts, self.count = [], 0
        kept = reach >= self.threshold[queries]
        rows, queries, reach = rows[kept], queries[kept], reach[kept]
        bar = kth(reach, queries, self._k, len(self.threshold))
        foremost = reach >= torch.where(bar == -torch.inf, torch.inf, bar)[queries]  # fewer than k raise nothing
        known = self._at_least(rows[foremost], queries[foremost])
        self.raise_to(kth(known, queries[foremost], self._k, len(self.threshold)))
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
        self.raise_to(self._best[-1])

    def raise_to(self, known: Float[Tensor, " q"]) -> None:
        """Take note of similarities that k rows reach."""
        self.threshold = torch.maximum(self.threshold, known)


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


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
