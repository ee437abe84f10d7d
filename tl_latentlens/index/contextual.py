"""A bank, or several of one model, made searchable on a device: the cross-layer search, and the texts of what it finds."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.bank.bank import Bank, Row
from tl_latentlens.errors import InvalidInputError, ModelMismatchError
from tl_latentlens.index.banks import different_models, open_banks
from tl_latentlens.index.cross_layer import n_found_in, search_hook_names, transform_queries
from tl_latentlens.index.distinct import distinct_rows
from tl_latentlens.index.grouped import row_search
from tl_latentlens.index.hook_name_search import HookNameSearch, Searches
from tl_latentlens.index.hook_names import (
    default_hook_names,
    expand_heads,
    hook_names_to_load,
    requested_hook_names,
    require_hook_names,
)
from tl_latentlens.index.index_words import IndexWords
from tl_latentlens.index.known import KnownTokens
from tl_latentlens.index.nearness import mix_rows, nearness
from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.index.opened import ReopenedIndex
from tl_latentlens.index.placed_rows import SearchOptions
from tl_latentlens.index.rows import BankRows
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.index.start_workers import start_workers
from tl_latentlens.index.transforms import TRANSFORMS
from tl_latentlens.index.uses import TokenUses
from tl_latentlens.index.word_search import WordSearchResult, chances_of, left_out_stems, require_words
from tl_latentlens.model.fingerprint_check import check_fingerprint
from tl_latentlens.model.heads import hook_point
from tl_latentlens.model.info import ModelInfo
from tl_latentlens.model.layers import one_hook_name
from tl_latentlens.search.ambient import autocast_state, own_arithmetic
from tl_latentlens.search.device import as_device
from tl_latentlens.search.tensors import as_tensor
from tl_latentlens.views.context import Context
from tl_latentlens.views.data import NeighborLine, PropertyTable
from tl_latentlens.views.notebook import properties_html
from tl_latentlens.views.text import short_hook_name


class ContextualIndex(ReopenedIndex):
    """The contextual tokens of a bank, searchable across hook names: the cross-layer search of LatentLens (arXiv 2602.00462).

    `search` finds the nearest tokens of any vectors of the model. `transform` is how it compares them, `direction_transform`
    how `for_directions` does, which reads directions.
    """

    bank_rows: BankRows
    n_rows: int
    hook_names: tuple[str, ...]
    model_info: ModelInfo
    transform: str
    direction_transform: str
    device: torch.device
    _searches: Searches
    _is_approximate: bool
    _known_tokens: dict[tuple[str, tuple[str, ...]], KnownTokens]
    _token_uses: dict[str, TokenUses]
    _words: IndexWords
    _checked_models: WeakKeyDictionary[Any, set[Any]]  # the states of autocast in which each was checked

    @own_arithmetic()
    def __init__(
        self,
        bank: Bank | str | Path | Sequence[Bank | str | Path],
        hook_names: int | str | Iterable[int | str] | None = None,
        device: torch.device | str | None = None,
        dtype: str = "auto",
        transform: str = "auto",
        *,
        approximate: bool | str = False,
        memory_budget: int | None = None,
        verify: bool = True,
        allow_mismatch: bool = False,
        on: str | None = None,
        n_workers: int | None = None,
    ) -> None:
        """Load vectors onto a device; on the CPU they stay memory-mapped.

        The checksum of every block that is loaded is checked first.

        Args:
            bank: A bank, a path (of a file, or of the folder of its shards), or a list of either. The banks are of one model,
                and their rows follow each other. Banks with the same plan (one file a hook name, say) share their rows.
            hook_names: The hook names to load; None: all. "blocks.3.attn.hook_z[5]" is head 5 of one. The name
                "blocks.3.attn.hook_z[:]" stands for all its heads. Each is a hook name of its own, of width d_head. Layers
                stand for their hook_resid_post: 3, -1 (the last), "3-8", range(3, 9), "all".
            device: None: CUDA where there is one, else the CPU.
            dtype: Precision of the coarse pass of a search; the result is exact for all (see `VectorSearch`).
            transform: How vectors are compared. "auto" compares activations as "raw" does, and directions (`for_directions`) as
                "center" does. "raw" compares all vectors as they are. The others use statistics of each hook name's rows. Give
                `query_hook_name` when you search activations; the mean of that hook name is then subtracted from them.
                Directions are differences of activations, so no mean is subtracted from them.

                - "center" subtracts the mean of the rows.
                - "standardize" also divides each dimension by its standard deviation.
                - "remove_top" also removes the d / 100 first principal components.
                - "csls" centers, and subtracts from each similarity half the row's mean cosine to its ten nearest rows of a
                  sample, since a hub is near to everything. The result is no cosine.
                - "center_writing" subtracts each vector's own mean over d_model, in the residual stream, as TransformerLens'
                  center_writing_weights does. Raw and centered LayerNorm models and banks agree then.
            approximate: Search with FAISS (extra "faiss"). It may miss neighbors; the similarities of those it finds are exact.
                True, or a string that `faiss.index_factory` takes ("IVF1024,PQ64x4fs"). `recall` says how many it finds.
            memory_budget: Most bytes of working memory for a search.
            verify: Check the loaded blocks: one pass over the bytes, as fast as they come from disk or page cache. False for
                a bank that `Bank.verify` has just passed.
            allow_mismatch: Warn instead of raising where a model, or another bank, is not of the first bank's model.
            on: "ray": Ray actors (extra "ray") hold the files and search them, on `device` each. "distributed": the processes
                of torch.distributed do; each of them makes the index and asks it the same. The answers are those of one index.
                This process only looks rows up. None: this process searches.
            n_workers: How many Ray actors; None: one a file, and no more than there are GPUs, or processors.

        Raises:
            UnknownHookError: A hook name that no bank has.
            ModelMismatchError: Banks of different models.
            BankCorruptError: A block that does not match its checksum.
            InvalidInputError: No bank, no hook name, an unknown transform, or a device that does not exist.
        """
        self.banks = open_banks(bank)
        if transform not in ("auto", *TRANSFORMS):
            raise InvalidInputError(f"got transform={transform!r}; expected 'auto' or one of {list(TRANSFORMS)}")
        self.transform, self.direction_transform = ("raw", "center") if transform == "auto" else (transform, transform)
        self.device = as_device(device if on is None else "cpu")
        self.allow_mismatch = allow_mismatch
        self.model_info = self.banks[0].model_info
        for other in self.banks[1:]:
            if message := different_models(self.model_info, other.model_info, ignores_centering=self._ignores_centering):
                self._mismatch(message)
        self.bank_rows = BankRows(self.banks)
        self.n_rows = self.bank_rows.n_rows
        self.hook_names = hook_names_to_load(hook_names, self.bank_rows)
        if verify and on is None:
            self._verify_loaded_blocks()
        self._is_approximate = bool(approximate)
        of_search = {"device": device, "dtype": dtype, "memory_budget": memory_budget}
        workers = start_workers(on, n_workers, self.bank_rows, self.hook_names, of_search, approximate, verify)
        options = SearchOptions(self.transform, self.device, dtype, approximate, memory_budget, is_elsewhere=on is not None)
        searches = {name: HookNameSearch(name, self.bank_rows.of(name), options) for name in self.hook_names}
        self._searches = Searches(searches, self.transform, workers)
        self._known_tokens, self._token_uses = {}, {}
        self._words = IndexWords(self._searches, self.bank_rows, is_approximate=self._is_approximate)
        self._checked_models = WeakKeyDictionary()
        settings = {"device": None if device is None else str(device), "dtype": dtype, "approximate": approximate}
        settings |= {"transform": transform, "memory_budget": memory_budget, "verify": verify, "on": on, "n_workers": n_workers}
        self._remember({"hook_names": self.hook_names, **settings})

    def __repr__(self) -> str:
        hooks = ", ".join(self.hook_names)
        return f"ContextualIndex({self.n_rows} rows × [{hooks}], {self.model_info.name}, {self.transform}, on {self._place})"

    def _repr_html_(self) -> str:
        n_banks = len(self.banks)
        properties = {
            "model": self.model_info.name,
            "rows": f"{self.n_rows:,} of {n_banks} bank{'s' * (n_banks > 1)}",
            "hook names": [f"{short_hook_name(name)} [{self.d(name)}]" for name in self.hook_names],
            "transform": self.transform + "; directions center" * (self.direction_transform != self.transform),
            "device": self._place,
        }
        return properties_html(PropertyTable("ContextualIndex", properties, []))

    @property
    def _place(self) -> str:
        """Where the rows are searched, in words."""
        return str(self._searches.workers or self.device)

    @property
    def centers_activations(self) -> bool:
        """True where activations are searched otherwise than directions, so that their hook name matters."""
        return any(search.centers_activations for search in self._searches.values())

    @cached_property
    @own_arithmetic()
    def for_directions(self) -> "ContextualIndex":
        """The index in which directions are read: with transform "auto" one of the same rows, centered, else this one.

        A direction stands for what is above the mean, so the mean of each hook name's rows is subtracted from them. The two
        share the banks and the rows on the device. The first search of directions measures the rows once more, and makes codes
        of its own where the search uses codes (a byte a number). `search` of this index stays raw.
        """
        if self.direction_transform == self.transform:
            return self
        index = object.__new__(type(self))
        vars(index).update(vars(self))
        index.transform = self.direction_transform
        index._searches = self._searches.with_transform(index.transform)
        index._known_tokens, index._token_uses, index._words = {}, {}, self._words.searched_by(index._searches)
        index._remember({**self._settings, "transform": index.transform})
        return index

    def removes_own_mean(self, hook_name: str) -> bool:
        """True where each vector's own mean over d_model is subtracted before it is compared."""
        return self._searches[hook_name].geometry.removes_own_mean

    def d(self, hook_name: str) -> int:
        """Width of a hook name's vectors."""
        require_hook_names([hook_name], self.hook_names)
        return self._searches[hook_name].d

    @own_arithmetic()
    def search(
        self,
        vectors: Float[Tensor, "... d"] | np.ndarray,
        top_k: int = 5,
        hook_names: int | str | Iterable[int | str] | None = None,
        query_hook_name: int | str | None = None,
        *,
        distinct: bool = False,
        calibrate: bool = False,
    ) -> SearchResult:
        """The nearest contextual tokens of each vector, over all loaded hook names of its width, ranked together.

        Args:
            vectors: Activations or directions, any leading shape; normalised here.
            top_k: Neighbors of each; fewer come back where the index holds fewer.
            hook_names: Narrow the search to these. Must be given for an index of several heads (or `query_hook_name`).
            query_hook_name: The hook name, or layer, that the vectors come from. A transform uses its mean and scale for them.
                None for directions, to which the scale of each hook name that is searched is applied (`for_directions` is the
                index that centers them by default). A head's vectors are searched among those of that head alone.
            distinct: List each row once, at its best hook name (`Neighbor.hook_names` says at which others it is among the rows
                up to the last one). The rows of one token at several layers are near to each other, so most of a list may go to
                few tokens without it.
            calibrate: Also say whether the bank knows the token (`SearchResult.known`; `known` says how), and how likely a
                random activation comes as near to each row (`SearchResult.chances`; `chances` says how).

        Raises:
            InvalidInputError: A width that no searched hook name has; NaN, inf or zero vectors; several heads, whose spaces
                are not the same, and no word on which to search.
            UnknownHookError: A hook name that is not loaded.
        """
        tensor = as_tensor(vectors)
        if query_hook_name is not None:
            query_hook_name = one_hook_name(query_hook_name, self.model_info.n_layers)
        searched = self._hook_names_to_search(tensor, hook_names, query_hook_name)
        queries = transform_queries(tensor, self._searches, searched, query_hook_name, self.device)
        result = self._search_distinct(queries, top_k, query_hook_name) if distinct else None
        if result is None:
            found = search_hook_names(queries, self._searches, top_k, query_hook_name, is_approximate=self._is_approximate)
            result = SearchResult(found.similarities, found.rows, found.hook_ids, self)
        if not calibrate:
            return result
        known = None if query_hook_name is None else self.known(tensor, result, query_hook_name, hook_names)
        return replace(result.with_chances(), known=known)

    @own_arithmetic()
    def search_words(
        self,
        vectors: Float[Tensor, "... d"] | np.ndarray,
        top_k: int = 8,
        hook_names: int | str | Iterable[int | str] | None = None,
        query_hook_name: int | str | None = None,
        *,
        unlike: str | Sequence[str | None] | None = None,
        language: str | None = "english",
        calibrate: bool = False,
    ) -> WordSearchResult:
        """The words nearest to each vector: each once, at the nearest row that ends it or an inflection of it.

        The nearest rows of a token are mostly uses of the token itself. The nearest *other* words say what it means here: leave
        out its own with `unlike`. A row has a word where its token ends one of three letters or more without digits, subwords
        merged; rows inside a word, punctuation, digits and special tokens are passed over. The result is that of a search of
        all rows, however many of them one word fills.

        Args:
            vectors: As `search` takes them.
            top_k: Words of each vector; fewer come back where the index holds fewer.
            hook_names: Narrow the search to these. None: `query_hook_name` where it is loaded, else as `search`.
            query_hook_name: The hook name, or layer, that the vectors come from; None for directions.
            unlike: A word that is left out with its inflections, in any case: for all vectors, or one (or None) for each, over
                the flattened leading shape. Of several words in one text, each is left out.
            language: Of the stemmer that tells which words are inflections of one, as Snowball names it. None: words are the
                same where their letters are.
            calibrate: Also say how likely a random activation comes as near (`NearWord.chance`).

        Raises:
            InvalidInputError: As `search`; a language without a stemmer; another number of words than of vectors.
        """
        tensor = as_tensor(vectors)
        require_top_k(top_k)
        n_queries, table = math.prod(tensor.shape[:-1]), self._words.table(language)
        left_out = torch.from_numpy(left_out_stems(unlike, n_queries, table)).to(self.device)
        top_k = min(top_k, max(1, len(table.stems)))
        if query_hook_name is not None:
            query_hook_name = one_hook_name(query_hook_name, self.model_info.n_layers)
            hook_names = query_hook_name if hook_names is None and query_hook_name in self._searches else hook_names
        searched = self._hook_names_to_search(tensor, hook_names, query_hook_name)
        queries = transform_queries(tensor, self._searches, searched, query_hook_name, self.device)
        queries = {name: units.reshape(-1, units.shape[-1]) for name, units in queries.items()}
        words = self._words.nearest(language).search(queries, top_k, query_hook_name, left_out)
        shape = (*tensor.shape[:-1], top_k)
        similarities, rows, hook_ids = words.similarities.view(shape), words.rows.view(shape), words.hook_ids.view(shape)
        chances = chances_of(words, self).view(shape) if calibrate else None
        return WordSearchResult(similarities, rows, hook_ids, self, table, chances)

    @own_arithmetic()
    def words_around(
        self,
        vectors: Float[Tensor, "n d"] | np.ndarray,
        query_hook_name: int | str,
        words: Sequence[str | None],
        *,
        top_k: int = 5,
        language: str | None = "english",
    ) -> list[list[str]]:
        """The words that stand around the uses nearest to each activation and not around other uses of the same word.

        The uses are up to 200 rows of the activation's hook name that end its word or an inflection of it, of one prompt each,
        evenly spaced over the bank, in the order of how near they are. Near is as in `known`. A word stands around a use where
        it ends within eight tokens of it. It is listed where the uses that it stands around, two at least and at most half, are
        nearer than as many drawn at random (rank-sum test of Wilcoxon), at a level at which one activation in twenty lists any
        word where its uses stand in a random order (Tarone 1990).

        Args:
            vectors: Activations of `query_hook_name`, [n, d].
            query_hook_name: The hook name, or layer, that they come from.
            words: The word that the token of each belongs to; None: none.
            top_k: Most words of each.
            language: Of the stemmer, as for `search_words`.

        Returns:
            A list of words for each activation, the most telling first; empty where there are none, and where the bank has
            fewer than 15 uses of the word.

        Raises:
            UnknownHookError: A hook name that is not loaded.
            InvalidInputError: As `search`; a language without a stemmer; another number of words than of vectors.
        """
        tensor, name = as_tensor(vectors), one_hook_name(query_hook_name, self.model_info.n_layers)
        require_hook_names([name], self.hook_names)
        require_top_k(top_k)
        require_words(words, len(tensor))
        return self._words.around(name, language).words(tensor, words, top_k)

    def contexts_hold(
        self, rows: Int[Tensor, "..."] | np.ndarray, words: Sequence[str], *, language: str | None = "english"
    ) -> Bool[np.ndarray, "... words"]:
        """True where a row's context holds one of some words, as a whole word, in any case and inflection.

        The context is the word of the row's token, and the words that end within eight tokens of it.

        Args:
            rows: Rows of the index, in any shape.
            words: Words of three letters or more.
            language: Of the stemmer, as Snowball names it; None: the same letters only.

        Raises:
            InvalidInputError: Something that is not one such word, a row that is not there, or a language without a stemmer.
        """
        numbers = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.n_rows):
            raise InvalidInputError(f"got rows {numbers.min()} to {numbers.max()}; the index has rows 0 to {self.n_rows - 1}")
        return self._words.contexts(language).holds(numbers, words)

    @own_arithmetic()
    def known(
        self,
        vectors: Float[Tensor, "... d"] | np.ndarray,
        found: SearchResult,
        query_hook_name: int | str,
        hook_names: int | str | Iterable[int | str] | None = None,
    ) -> Float[Tensor, "..."] | None:
        """How well the bank knows each activation, in (0, 1]: the share of the bank's own tokens that are no nearer to theirs.

        A token of the bank is as near as its nearest row in another prompt, an activation as its nearest row. The share is
        (1 + n no nearer) / (1 + n), over up to 256 rows of the same hook name whose token stands in another prompt too,
        frequent and rare tokens in the shares that they have in the bank's texts. Near is the cosine of both vectors as they
        are compared, each less the mean of its hook name. So a token that the bank holds gets 0.05 or less in about one of
        twenty cases. 0.05 or less says that the bank does not know this token: its neighbors are the nearest of what is there,
        and no reading.

        The bank's tokens are searched once for each `query_hook_name`, which takes as long as 256 queries.

        Args:
            vectors: Activations of `query_hook_name`.
            found: What `search` found for them.
            query_hook_name: The hook name, or layer, that they come from.
            hook_names: Those that the search was narrowed to.

        Returns:
            A share for each query; None where there is none: for a hook name that the index does not hold, for another width
            than its own, or where no token of the bank stands in two prompts.
        """
        tensor, name = as_tensor(vectors), one_hook_name(query_hook_name, self.model_info.n_layers)
        if name not in self._searches or self.d(name) != tensor.shape[-1]:
            return None
        searched = tuple(self._hook_names_to_search(tensor, hook_names, name))
        if (name, searched) not in self._known_tokens:
            known_tokens = KnownTokens(name, searched, self._searches, self.bank_rows, is_approximate=self._is_approximate)
            self._known_tokens[name, searched] = known_tokens
        rows, hook_ids = (numbers[..., 0].reshape(-1) for numbers in (found.rows, found.hook_ids))
        shares = self._known_tokens[name, searched].shares(tensor.reshape(-1, tensor.shape[-1]), rows, hook_ids)
        return None if shares is None else shares.reshape(found.rows.shape[:-1])

    @own_arithmetic()
    def use_chances(
        self,
        vectors: Float[Tensor, "... d"] | np.ndarray,
        found: SearchResult,
        query_hook_name: int | str,
        token_ids: Int[Tensor, "..."] | np.ndarray,
    ) -> Float[Tensor, "..."] | None:
        """The chance that another use of an activation's token comes as near to its nearest row as it does, in (0, 1].

        It is the share of up to 200 other uses of the token at the activation's hook name, evenly spaced over the bank and in
        other prompts than the row's: (1 + n at least as near) / (1 + n). Near is as in `known`. Low: few uses of the word are
        as near to this one, so it is likely to be used alike. High: the row is near to most uses of the word, and says little
        on this one.

        Args:
            vectors: Activations of `query_hook_name`.
            found: What `search` found for them.
            query_hook_name: The hook name, or layer, that they come from.
            token_ids: The token that each stands at.

        Returns:
            A share for each query; NaN where the nearest row is of another token, or of one with fewer than five other uses.
            None for a hook name that the index does not hold.
        """
        tensor, name = as_tensor(vectors), one_hook_name(query_hook_name, self.model_info.n_layers)
        if name not in self._searches or self.d(name) != tensor.shape[-1]:
            return None
        if name not in self._token_uses:
            self._token_uses[name] = TokenUses(name, self._searches, self.bank_rows)
        ids = as_tensor(token_ids).cpu().numpy().reshape(-1)
        rows, hook_ids = (numbers[..., 0].reshape(-1) for numbers in (found.rows, found.hook_ids))
        chances = self._token_uses[name].chances(tensor.reshape(-1, tensor.shape[-1]), rows, hook_ids, ids)
        return chances.reshape(found.rows.shape[:-1])

    @own_arithmetic()
    def chances(self, found: SearchResult) -> Float[Tensor, "... k"]:
        """The chance that a random activation comes as near to each found row as the query did, in (0, 1].

        It is the share of a sample of rows that have at least this similarity to the found row: (1 + n) / (1 + sample size).
        The sample is up to 4,096 other rows of the same hook name, evenly spaced over the bank. A chance means the same at
        every layer and with every transform, while a cosine of 0.9 may be near at one layer and nothing at the next. It is the
        p-value of one row that was given beforehand. The nearest of many rows is nearly always nearer than a random activation,
        also where the bank does not have the token; `known` is the figure for that.
        """
        chances = torch.ones_like(found.similarities)
        for hook_id in found.hook_ids.unique().tolist():
            places = (found.hook_ids == hook_id).nonzero(as_tuple=True)
            search = self._searches[self.hook_names[hook_id]]
            chances[places] = search.chances(found.rows[places], found.similarities[places])
        return chances

    @own_arithmetic()
    def recall(self, vectors: Float[Tensor, "... d"] | np.ndarray, top_k: int = 5) -> dict[str, float]:
        """Share of the exact neighbors that an approximate index finds, in [0, 1], for each hook name of the vectors' width.

        It takes an exact search of every row. A few hundred vectors of the kind that will be decoded are enough.
        """
        width = as_tensor(vectors).shape[-1]
        return {name: search.recall(vectors, top_k) for name, search in self._searches.items() if search.d == width}

    def row(self, row: int) -> Row:
        """The contextual token of a row of the index."""
        return self.bank_rows.row(row)

    def neighbor(
        self, row: int, hook_id: int, similarity: float, chance: float | None = None, hook_ids: Sequence[int] = ()
    ) -> Neighbor:
        """The neighbor at one row, with its text; `hook_ids` are all at which it was found."""
        found, names = self.row(row), self._found_at(hook_id, hook_ids)
        place = found.position, found.prompt_index, row
        return Neighbor(found.token, found.context(), *place, names[0], similarity, chance, names)

    def neighbor_line(
        self, row: int, hook_id: int, similarity: float, chance: float | None = None, hook_ids: Sequence[int] = ()
    ) -> NeighborLine:
        """The neighbor at one row, as views draw it."""
        found, names = self.row(row), self._found_at(hook_id, hook_ids)
        return NeighborLine(found.window(), similarity, chance, names[0], row, found.prompt_index, names)

    def _found_at(self, hook_id: int, hook_ids: Sequence[int]) -> tuple[str, ...]:
        """The names of the hook names at which a row was found, the best first."""
        return tuple(self.hook_names[i] for i in dict.fromkeys([hook_id, *hook_ids]))

    def contexts(self, rows: Iterable[int], width: int) -> dict[int, Context]:
        """Rows in their texts, at most `width` columns of a terminal, each looked up once."""
        return {row: self.row(row).window(width).clipped(width) for row in set(rows)}

    def check_model(self, model: Any, *, force: bool = False) -> None:
        """Replay the bank's fingerprint on a model; done once for each model, with autocast and without, unless `force`.

        Raises:
            ModelMismatchError: Another model, tokenizer, or weight processing than the bank's; with `allow_mismatch` a
                warning instead.
        """
        checked, state = self._checked_models.setdefault(model, set()), autocast_state()
        if force or state not in checked:
            for bank in self.banks:
                try:
                    hooked, without_means = bank.file.metadata.hooked, self._ignores_centering
                    check_fingerprint(model, bank.fingerprint, bank.model_info, without_means=without_means, hooked=hooked)
                except ModelMismatchError as error:
                    self._mismatch(str(error))
            checked.add(state)

    @own_arithmetic()
    def transform_activations(
        self, hook_name: str, activations: Float[Tensor, "n d"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """Activations as the rows of their hook name are compared; see `HookNameSearch.transform_activations`."""
        return self._searches[hook_name].transform_activations(activations)

    def searched_hook_names(
        self, vectors: Float[Tensor, "... d"], hook_names: int | str | Iterable[int | str] | None = None
    ) -> list[str]:
        """The hook names that `search` searches for directions."""
        return self._hook_names_to_search(vectors, hook_names, None)

    @own_arithmetic()
    def nearness(
        self, directions: Float[Tensor, "n d"], found: SearchResult, hook_names: Sequence[str]
    ) -> Float[Tensor, "n k"]:
        """How far the neighbors of directions among some hook names are above random rows; see `nearness.nearness`."""
        queries = transform_queries(as_tensor(directions), self._searches, hook_names, None, self.device)
        return nearness(self._searches, queries, found)

    @own_arithmetic(full_products=True)
    def random_directions(self, n: int, hook_names: Sequence[str], seed: int) -> Float[Tensor, "n d"]:
        """Directions with the covariance of the rows of some hook names of one width; see `nearness.mix_rows`."""
        return mix_rows([self._searches[name] for name in hook_names], n, seed)

    def _search_distinct(
        self, queries: Mapping[str, Float[Tensor, "... d"]], top_k: int, query_hook_name: str | None
    ) -> SearchResult | None:
        """The nearest rows, each once; None where no row can be found twice."""
        rows_of = {first_row: n for name in queries for first_row, n in self._searches[name].row_spans.items()}
        n_rows, n_found = sum(rows_of.values()), n_found_in(queries, self._searches)
        if n_rows == n_found or top_k < 2:
            return None
        shape = next(iter(queries.values())).shape[:-1]
        flat = {name: units.reshape(-1, units.shape[-1]) for name, units in queries.items()}
        search = row_search(flat, self._searches, query_hook_name, is_approximate=self._is_approximate)
        n_queries, top_k = math.prod(shape), min(top_k, n_rows)
        distinct = distinct_rows(search, n_queries, n_found, top_k, len(self.hook_names), self.device)
        similarities, rows, hook_ids = (numbers.view(*shape, top_k) for numbers in vars(distinct.found).values())
        return SearchResult(similarities, rows, hook_ids, self, is_at=distinct.is_at.view(*shape, top_k, len(self.hook_names)))

    @property
    def _ignores_centering(self) -> bool:
        """True where models and banks with raw and with mean-centered weights are compared alike."""
        return self.transform == "center_writing"

    def _mismatch(self, message: str) -> None:
        if not self.allow_mismatch:
            raise ModelMismatchError(message)
        warnings.warn(message, stacklevel=3)

    def _verify_loaded_blocks(self) -> None:
        points = list(dict.fromkeys(map(hook_point, self.hook_names)))
        for bank in self.banks:
            bank.verify([name for name in points if name in bank.hook_names])

    def _hook_names_to_search(
        self, vectors: Float[Tensor, "... d"], hook_names: int | str | Iterable[int | str] | None, query_hook_name: str | None
    ) -> list[str]:
        """The loaded hook names to search for vectors, in the order in which they were loaded."""
        width = vectors.shape[-1] if vectors.ndim else 0
        requested = list(self.hook_names)
        if hook_names is not None:
            requested = expand_heads(requested_hook_names(hook_names, self.bank_rows, self.hook_names), self.bank_rows)
            require_hook_names(requested, self.hook_names)
        searched = [name for name in self.hook_names if name in requested and self.d(name) == width]
        if hook_names is None:
            searched = default_hook_names(searched, query_hook_name)
        if not searched:
            widths = sorted({self.d(name) for name in requested})
            raise InvalidInputError(
                f"got vectors of width {width} (shape {tuple(vectors.shape)}); the index has width {widths}"
            )
        return searched


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
    if not isinstance(top_k, int | np.integer) or top_k < 1:
        raise InvalidInputError(f"got top_k={top_k!r}; expected at least 1, a whole number")
