"""A bank (or several of one model) made searchable on a device: which rows, which hook names, which transform."""

import warnings
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.bank.bank import Bank, Row
from tl_latentlens.errors import InvalidInputError, ModelMismatchError, UnknownHookError
from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.index.transforms import TRANSFORMS, fit, sample_rows
from tl_latentlens.model.fingerprint_check import check_fingerprint
from tl_latentlens.model.heads import head_of, hook_point
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.search.approximate import ApproximateSearch, approximate_top_k_of_parts
from tl_latentlens.search.device import as_device
from tl_latentlens.search.driver import top_k_of_parts
from tl_latentlens.search.queries import normalize_queries
from tl_latentlens.search.tensors import as_tensor
from tl_latentlens.search.vectors import VectorSearch
from tl_latentlens.views.context import Context
from tl_latentlens.views.data import NeighborLine, PropertyTable
from tl_latentlens.views.notebook import properties_html, search_html


@dataclass(frozen=True)
class SearchResult:
    """Neighbors of each query, nearest first; ties by hook order, then row.

    Attributes:
        similarities: Cosines in [-1, 1], float32, [..., k].
        rows: Rows of the index, int64, [..., k].
        hook_ids: Places in `index.hook_names`, int64, [..., k].
        chances: How likely a random activation comes as near to each row, in (0, 1], [..., k]; None where it was not asked for.
    """

    similarities: Float[Tensor, "... k"]
    rows: Int[Tensor, "... k"]
    hook_ids: Int[Tensor, "... k"]
    index: "ContextualIndex" = field(repr=False)
    chances: Float[Tensor, "... k"] | None = None

    def __getitem__(self, at: Any) -> "SearchResult":
        """The neighbors of some of the queries, chosen as in their leading shape."""
        chances = None if self.chances is None else self.chances[at]
        return SearchResult(self.similarities[at], self.rows[at], self.hook_ids[at], self.index, chances)

    def _repr_html_(self) -> str:
        places = (", ".join(map(str, place)) for place in np.ndindex(*self.rows.shape[:-1]))
        queries = ((place, self.neighbor_lines(i)) for i, place in enumerate(places))
        return search_html(queries, int(np.prod(self.rows.shape[:-1])))

    def neighbors(self) -> Any:
        """Neighbors in nested lists of the queries' leading shape; text is looked up here and not before."""
        flat = [self.neighbors_of(i) for i in range(int(np.prod(self.rows.shape[:-1])))]
        for axis in range(self.rows.ndim - 2, 0, -1):
            size, groups = self.rows.shape[axis], int(np.prod(self.rows.shape[:axis]))
            flat = [flat[i * size : (i + 1) * size] for i in range(groups)]
        return flat[0] if self.rows.ndim == 1 else flat

    @cached_property
    def _on_host(self) -> list[np.ndarray]:
        k = self.rows.shape[-1]
        parts = [self.rows, self.hook_ids, self.similarities, *([] if self.chances is None else [self.chances])]
        return [part.reshape(-1, k).cpu().numpy() for part in parts]

    def neighbors_of(self, query: int) -> list[Neighbor]:
        """Neighbors of one query, counted over the flattened leading shape."""
        found = (part[query].tolist() for part in self._on_host)
        return [self.index.neighbor(*one) for one in zip(*found, strict=True)]

    def with_chances(self) -> "SearchResult":
        """The same neighbors with `chances`."""
        return self if self.chances is not None else replace(self, chances=self.index.chances(self))

    def neighbor_lines(self, query: int, n_neighbors: int | None = None) -> list[NeighborLine]:
        """The same as views draw them, at most so many; None: all."""
        found = (part[query][:n_neighbors].tolist() for part in self._on_host)
        return [self.index.neighbor_line(*one) for one in zip(*found, strict=True)]


class ContextualIndex:
    """Nearest contextual neighbors across every loaded hook name (the cross-layer search of LatentLens, arXiv 2602.00462)."""

    def __init__(
        self,
        bank: Bank | str | Path | Sequence[Bank | str | Path],
        hook_names: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: str = "auto",
        transform: str = "auto",
        *,
        approximate: bool | str = False,
        memory_budget: int | None = None,
        verify: bool = True,
        allow_mismatch: bool = False,
    ) -> None:
        """Load vectors onto a device; on the CPU they stay memory-mapped.

        Every block that is loaded is first held against its checksum.

        Args:
            bank: A bank, a path, or a list of either: banks of one model, their rows one after the other. Banks with the
                same plan (one file a hook name, say) share their rows.
            hook_names: Which of the bank's hook names to load; None: all. "blocks.3.attn.hook_z[5]" is head 5 of one,
                "blocks.3.attn.hook_z[:]" are all its heads, each a hook name of its own of width d_head.
            device: None: CUDA where there is one, else the CPU.
            dtype: Precision of the approximate first pass of a search; the result is exact for all (see `VectorSearch`).
            transform: "raw" ("auto") compares activations as they are. The others look at what tells a hook name's rows apart,
                and so at queries whose hook name is given; of directions, which are differences, nothing is subtracted:
                "center" takes the mean away. "standardize" also divides each dimension by its standard deviation.
                "remove_top" also takes the d / 100 first principal components away. "csls" centers, and takes from each
                similarity half the row's mean cosine to its ten nearest of a sample of rows (a hub is near to everything);
                it is no cosine then. "center_writing" takes each vector's own mean over d_model away, in the residual
                stream, as TransformerLens' center_writing_weights does: raw and centred LayerNorm models and banks agree.
            approximate: Search with FAISS (extra "faiss"), which may miss neighbors; the similarities of those that it finds
                are exact. True, or what `faiss.index_factory` takes ("IVF1024,PQ64x4fs"). `recall` says how many it finds.
            memory_budget: Most bytes of working memory for a search.
            verify: Check the loaded blocks: one pass over the bytes, as fast as they come from disk or page cache. False for
                a bank that `Bank.verify` has just passed.
            allow_mismatch: Warn where a model or a bank is not the first bank's, and go on.

        Raises:
            UnknownHookError: A hook name that no bank has.
            ModelMismatchError: Banks of different models.
            BankCorruptError: A block that does not match its checksum.
        """
        sources = [bank] if isinstance(bank, Bank | str | Path) else list(bank)
        self.banks = [source if isinstance(source, Bank) else Bank.open(source) for source in sources]
        if not self.banks:
            raise InvalidInputError("got an empty list of banks; expected at least one")
        if transform not in ("auto", *TRANSFORMS):
            raise InvalidInputError(f"got transform={transform!r}; expected 'auto' or one of {list(TRANSFORMS)}")
        self.transform = "raw" if transform == "auto" else transform
        self.device = as_device(device)
        self.allow_mismatch = allow_mismatch
        self.model_info = self.banks[0].model_info
        for other in self.banks[1:]:
            first, second = self._comparable(self.model_info), self._comparable(other.model_info)
            if names := [name for name in first if first[name] != second[name]]:
                sides = (", ".join(f"{name}={side[name]!r}" for name in names) for side in (first, second))
                centering = " or, without their means, with transform='center_writing'" * (names == ["centered"])
                self._mismatch(f"banks of different models: {' and '.join(sides)}; index them apart{centering}")
        available = list(dict.fromkeys(name for bank in self.banks for name in bank.hook_names))
        hook_names = [hook_names] if isinstance(hook_names, str) else hook_names
        self._first_rows, self.n_rows = _first_rows(self.banks)
        asked = available if hook_names is None else hook_names
        if not asked:
            raise InvalidInputError(f"got no hook names; expected some of {available}, or None for all")
        self.hook_names = tuple(self._expand(asked))
        if verify:
            points = {hook_point(name): None for name in self.hook_names}
            for one in self.banks:
                one.verify([name for name in points if name in one.hook_names])
        self._factory = approximate if isinstance(approximate, str) else None
        self._approximate = bool(approximate)
        self._geometries = {name: fit(self.transform, self.banks_of(name), name, self.device) for name in self.hook_names}
        self._nulls: dict[str, tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]] = {}
        self._parts = {
            name: [(first, self._searcher(first, bank, name, dtype, memory_budget)) for first, bank in self.banks_of(name)]
            for name in self.hook_names
        }
        self._checked: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def __repr__(self) -> str:
        hooks = ", ".join(self.hook_names)
        return f"ContextualIndex({self.n_rows} rows × [{hooks}], {self.model_info.name}, {self.transform}, on {self.device})"

    def _repr_html_(self) -> str:
        n_banks = len(self.banks)
        properties = {
            "model": self.model_info.name,
            "rows": f"{self.n_rows:,} of {n_banks} bank{'s' * (n_banks > 1)}",
            "hook names": [f"{name} [{self.d(name)}]" for name in self.hook_names],
            "transform": self.transform,
            "device": str(self.device),
        }
        return properties_html(PropertyTable("ContextualIndex", properties, []))

    @property
    def moves_queries(self) -> bool:
        """True where an activation is searched otherwise than a direction, so that its hook name matters."""
        return any(geometry.affine.center is not None for geometry in self._geometries.values())

    def d(self, hook_name: str) -> int:
        """Width of a hook name's vectors."""
        _require_names([hook_name], self.hook_names, "the index")
        return self._parts[hook_name][0][1].d

    @torch.no_grad()
    def search(
        self,
        vectors: Float[Tensor, "... d"] | np.ndarray,
        top_k: int = 5,
        hook_names: str | Sequence[str] | None = None,
        query_hook_name: str | None = None,
        *,
        calibrate: bool = False,
    ) -> SearchResult:
        """The nearest contextual tokens of each vector, over all loaded hook names of its width, ranked together.

        Args:
            vectors: Activations or directions, any leading shape; normalised here.
            top_k: Neighbors of each; fewer come back where the index holds fewer.
            hook_names: Narrow the search to these. Must be given for an index of several heads (or `query_hook_name`).
            query_hook_name: The hook name that the vectors come from, whose mean and scale a transform uses for them. None
                for directions, which are put to the scale of each hook name that is searched. A head's vectors are searched
                among those of that head alone.
            calibrate: Also say how likely a random activation comes as near (`SearchResult.chances`; `chances` says how).

        Raises:
            InvalidInputError: A width that no searched hook name has; NaN, inf or zero vectors; several heads, whose spaces
                are not the same, and no word on which to search.
            UnknownHookError: A hook name that is not loaded.
        """
        tensor = as_tensor(vectors)
        width = tensor.shape[-1] if tensor.ndim else 0
        wanted = [hook_names] if isinstance(hook_names, str) else hook_names
        names = self.hook_names if wanted is None else _require_names(self._expand(wanted), self.hook_names, "the index")
        fitting = [name for name in self.hook_names if name in names and self.d(name) == width]
        if wanted is None:
            fitting = _of_one_space(fitting, query_hook_name)
        if not fitting:
            widths = sorted({self.d(name) for name in names})
            raise InvalidInputError(f"got vectors of width {width} (shape {tuple(tensor.shape)}); the index has width {widths}")
        queries = normalize_queries(tensor, width, self.device)
        own = None
        if self.moves_queries and query_hook_name is not None:
            _require_names([query_hook_name], self.hook_names, "the index")
            if self.d(query_hook_name) != width:
                raise InvalidInputError(f"got vectors of width {width}; {query_hook_name} has width {self.d(query_hook_name)}")
            own = self._geometries[query_hook_name]
        asked = dict.fromkeys(fitting, queries)
        for name in fitting if self.transform != "raw" else ():
            exact = queries.double()
            moved = self._geometries[name].directions(exact) if own is None else own.activations(exact)
            asked[name] = self._parts[name][0][1].normalize_queries(moved)
        # Rows are counted through the parts, which stand in hook order, then row order: so ties are broken in that order.
        places = [(self.hook_names.index(name), *part) for name in fitting for part in self._parts[name]]
        parts, units = [part for *_, part in places], [asked[self.hook_names[hook_id]] for hook_id, *_ in places]
        nearest = max(range(len(places)), key=lambda place: self.hook_names[places[place][0]] == query_hook_name)
        if self._approximate:
            best = approximate_top_k_of_parts(parts, units, top_k)
        else:
            together = [part.part(queries) for part, queries in zip(parts, units, strict=True)]
            best = top_k_of_parts(together, top_k, search_first=nearest)
        starts = torch.tensor(np.cumsum([0, *(len(part) for part in parts[:-1])]), device=self.device)
        place = torch.searchsorted(starts, best.rows, right=True) - 1
        hook_ids, firsts = (torch.tensor(numbers, device=self.device)[place] for numbers in list(zip(*places, strict=True))[:2])
        is_cosine = all(self._geometries[name].is_cosine for name in fitting)
        similarities = best.similarities.clamp(-1, 1) if is_cosine else best.similarities
        result = SearchResult(similarities, best.rows - starts[place] + firsts, hook_ids, self)
        return result.with_chances() if calibrate else result

    @torch.no_grad()
    def chances(self, found: SearchResult) -> Float[Tensor, "... k"]:
        """How likely a random activation comes as near to each found row as the query did, in (0, 1].

        The share of up to 4,096 rows of the row's own hook name, evenly spread over the bank, that have at least this
        similarity to it: (1 + n) / (1 + rows). It means the same at every layer and with every transform, while a cosine of
        0.9 may be near at one layer and nothing at the next. What chance alone explains (0.01 and more, say) is no reading. It
        is the p of one row: that the row was the nearest of many is not corrected for.
        """
        chances = torch.ones_like(found.similarities)
        for hook_id in found.hook_ids.unique().tolist():
            name = self.hook_names[hook_id]
            at = (found.hook_ids == hook_id).nonzero(as_tuple=True)
            rows, similarities = found.rows[at], found.similarities[at]
            numbers, null = self._null(name)
            for some in torch.arange(len(rows), device=rows.device).split(max(1, 2**24 // max(len(null), self.d(name)))):
                units, offsets = self._units(name, rows[some])
                scores = units @ null.T - offsets[:, None]
                # The found row may itself be of the sample; float32 products are off by about 1e-6.
                near = (scores >= similarities[some, None] - 1e-6) & (rows[some, None] != numbers)
                chances[tuple(place[some] for place in at)] = (1 + near.sum(-1)) / (1 + len(null))
        return chances

    def recall(self, vectors: Float[Tensor, "... d"] | np.ndarray, top_k: int = 5) -> dict[str, float]:
        """Share of the exact neighbors that an approximate index finds, in [0, 1], for each hook name of the vectors' width.

        Takes an exact search of every row; a few hundred vectors of the kind that will be decoded tell enough.
        """
        width = as_tensor(vectors).shape[-1]
        shares = {}
        for name in self.hook_names:
            if self.d(name) == width:
                parts = [part for _, part in self._parts[name]]
                found = [part.recall(vectors, top_k) if isinstance(part, ApproximateSearch) else 1.0 for part in parts]
                shares[name] = float(np.average(found, weights=[len(part) for part in parts]))
        return shares

    def row(self, row: int) -> Row:
        """The contextual token of a row of the index."""
        if not 0 <= row < self.n_rows:
            raise InvalidInputError(f"got row {row}; the index has rows 0 to {self.n_rows - 1}")
        starts, banks = self._banks_by_row
        at = bisect_right(starts, row) - 1
        return banks[at].row(row - starts[at])

    def neighbor(self, row: int, hook_id: int, similarity: float, chance: float | None = None) -> Neighbor:
        """The text of one found row."""
        found = self.row(row)
        name = self.hook_names[hook_id]
        return Neighbor(found.token, found.context(), found.position, found.prompt_index, row, name, similarity, chance)

    def neighbor_line(self, row: int, hook_id: int, similarity: float, chance: float | None = None) -> NeighborLine:
        """One found row as views draw it."""
        found = self.row(row)
        return NeighborLine(found.window(), similarity, chance, self.hook_names[hook_id], row, found.prompt_index)

    def contexts(self, rows: Iterable[int], width: int) -> dict[int, Context]:
        """Rows in their texts, at most `width` columns of a terminal, each looked up once."""
        return {row: self.row(row).window(width).clipped(width) for row in set(rows)}

    def check_model(self, model: Any, *, force: bool = False) -> None:
        """Replay the bank's fingerprint on a model; done once for each model unless `force`.

        Raises:
            ModelMismatchError: Another model, tokenizer, or weight processing than the bank's; with `allow_mismatch` a
                warning instead.
        """
        if force or model not in self._checked:
            for bank in self.banks:
                try:
                    check_fingerprint(
                        model, bank.fingerprint, bank.model_info, without_means=self.transform == "center_writing"
                    )
                except ModelMismatchError as error:
                    self._mismatch(str(error))
            self._checked[model] = True

    def banks_of(self, hook_name: str) -> list[tuple[int, Bank]]:
        """First row and bank for each plan that has a hook name, in row order; of two banks with the same rows, the first."""
        having: dict[int, Bank] = {}
        for first, bank in zip(self._first_rows, self.banks, strict=True):
            if hook_point(hook_name) in bank.hook_names:
                having.setdefault(first, bank)
        return sorted(having.items())

    @property
    def row_banks(self) -> list[tuple[int, Bank]]:
        """First row and bank for each plan, in row order; of banks with the same rows, the first."""
        return list(zip(*self._banks_by_row, strict=True))

    def row_token_ids(self, ahead: int = 0) -> Int[np.ndarray, " rows"]:
        """The token id at each row, or some tokens ahead of it in its prompt; -1 past the prompt's end."""
        parts = []
        for bank in self._banks_by_row[1]:
            plan = bank.plan
            at, end = plan.row_tokens + ahead, plan.prompt_starts[plan.row_prompts + 1]
            parts.append(np.where(at < end, plan.tokens[np.minimum(at, len(plan.tokens) - 1)], -1))
        return np.concatenate(parts)

    @cached_property
    def row_prompts(self) -> Int[np.ndarray, " rows"]:
        """The prompt of each row, counted through all banks."""
        plans = [bank.plan for bank in self._banks_by_row[1]]
        firsts = np.cumsum([0, *(plan.n_prompts for plan in plans)])
        return np.concatenate([plan.row_prompts + first for plan, first in zip(plans, firsts, strict=False)])

    def _mismatch(self, message: str) -> None:
        if not self.allow_mismatch:
            raise ModelMismatchError(message)
        warnings.warn(message, stacklevel=3)

    def _comparable(self, info: ModelInfo) -> dict[str, Any]:
        """What banks of one index must have in common: not the class, which gives the same activations."""
        apart = {"class_name", *(["centered"] if self.transform == "center_writing" else [])}
        return {name: value for name, value in asdict(info).items() if name not in apart}

    def _expand(self, names: Sequence[str]) -> list[str]:
        """The names, each [:] replaced by its heads."""
        available = [name for bank in self.banks for name in bank.hook_names]
        _require_names([hook_point(name) for name in names], available, "the index")
        return list(dict.fromkeys(one for name in names for one in self.banks_of(name)[0][1].head_names(name)))

    @cached_property
    def _banks_by_row(self) -> tuple[list[int], list[Bank]]:
        """The first rows, ascending, and the bank of each; of banks with the same rows, the first."""
        banks = dict(reversed(list(zip(self._first_rows, self.banks, strict=True))))
        starts = sorted(banks)
        return starts, [banks[start] for start in starts]

    @torch.no_grad()
    def compared(self, hook_name: str, activations: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Activations of a hook name as its rows are compared: unit vectors, and what is subtracted from similarities to them.

        Raises:
            InvalidInputError: A wrong width, NaN, inf, or an activation of which the transform leaves nothing.
        """
        d, geometry = self.d(hook_name), self._geometries[hook_name]
        moved = geometry.activations(normalize_queries(activations, d, self.device).double())
        units = normalize_queries(moved, d, self.device, remove_means=geometry.removes_own_mean)
        return units, units.new_zeros(len(units)) if geometry.hubs is None else geometry.hubs.penalty(units).float()

    def _units(self, hook_name: str, rows: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Rows of the index as they are compared, of length 1 (or 0), and what is subtracted from their similarities."""
        units = torch.zeros(len(rows), self.d(hook_name), dtype=torch.float32, device=self.device)
        offsets = torch.zeros(len(rows), dtype=torch.float32, device=self.device)
        for first, part in self._parts[hook_name]:
            here = (rows >= first) & (rows < first + len(part))
            units[here], offsets[here] = part.normalized_rows(rows[here] - first)
        return units, offsets

    def _null(self, hook_name: str) -> tuple[Int[Tensor, " n"], Float[Tensor, "n d"]]:
        """Row numbers and unit vectors that stand for random activations of a hook name."""
        if hook_name not in self._nulls:
            banks = self.banks_of(hook_name)
            parts = [first + rows for (first, _), rows in zip(banks, sample_rows(banks), strict=True)]
            rows = torch.from_numpy(np.concatenate(parts)).to(self.device)
            self._nulls[hook_name] = rows, self._units(hook_name, rows)[0]
        return self._nulls[hook_name]

    def _searcher(self, first: int, bank: Bank, name: str, dtype: str, memory_budget: int | None) -> VectorSearch:
        kind = partial(ApproximateSearch, factory=self._factory) if self._approximate else VectorSearch
        return kind(
            bank.vectors(name),
            self.device,
            dtype,
            unit_length=head_of(name) is None,  # a head's columns have any length
            geometry=self._geometries[name].starting_at(first),
            memory_budget=memory_budget,
        )


def require_index(index: Any) -> None:
    """Check that `index` is a ContextualIndex.

    Raises:
        InvalidInputError: It is something else, such as a path or a bank.
    """
    if not isinstance(index, ContextualIndex):
        raise InvalidInputError(
            f"got index={index!r:.80} ({type(index).__name__}); expected a ContextualIndex; make one of a bank or its "
            "path: ContextualIndex(bank)"
        )


def require_top_k(top_k: int) -> None:
    """Check that a number of neighbors is at least 1.

    Raises:
        InvalidInputError: It is not.
    """
    if top_k < 1:
        raise InvalidInputError(f"got top_k={top_k}; expected at least 1")


def _first_rows(banks: Sequence[Bank]) -> tuple[list[int], int]:
    """The index row of each bank's row 0, and the number of rows; banks with one plan share their rows."""
    first: dict[str, int] = {}
    rows = 0
    for bank in banks:
        if bank.plan_digest not in first:
            first[bank.plan_digest] = rows
            rows += bank.n_rows
    return [first[bank.plan_digest] for bank in banks], rows


def _of_one_space(fitting: list[str], query_hook_name: str | None) -> list[str]:
    """What a search looks in where that is left open: heads have spaces of their own, so a head's vectors look in it alone."""
    heads = [name for name in fitting if head_of(name) is not None]
    if query_hook_name in heads:
        return [query_hook_name]
    if query_hook_name in fitting:
        return [name for name in fitting if name not in heads]
    another = query_hook_name is not None and head_of(query_hook_name) is not None
    if heads and (another or len(fitting) > 1):
        raise InvalidInputError(
            f"got vectors of {query_hook_name or 'no hook name'} for an index of {', '.join(fitting[:3])}"
            f"{' …' if len(fitting) > 3 else ''}: each head has a space of its own, so cosines across heads mean nothing; say "
            f"whose vectors they are (query_hook_name={heads[0]!r}) or where to look (hook_names=)"
        )
    return fitting


def _require_names(names: Sequence[str], available: Sequence[str], what: str) -> list[str]:
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UnknownHookError(f"{what} has no hook name {unknown[0]!r}; it has {list(available)}")
    return list(dict.fromkeys(names))
