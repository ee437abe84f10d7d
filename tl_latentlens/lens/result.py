"""Readings of a run by lens hooks, as frozen data. Text is looked up only when it is needed; views draw what is built here."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from rich.console import Group

from tl_latentlens.errors import InvalidInputError, UnknownHookError
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.index.word_search import WordSearchResult
from tl_latentlens.lens.cell import Cell, table_of_cells, token_in_text
from tl_latentlens.lens.grid import text_grid
from tl_latentlens.lens.page_head import reading_head
from tl_latentlens.lens.positions import why_not_decoded
from tl_latentlens.lens.word_strip import WordStrip, position_of, word_strip
from tl_latentlens.model.layers import is_layer_choice, one_hook_name
from tl_latentlens.views.data import LensCell, TokenHeading, TokenReading
from tl_latentlens.views.files import output_path
from tl_latentlens.views.grids import LensGrid
from tl_latentlens.views.heatmap import heatmap, heatmaps
from tl_latentlens.views.notebook import NOTEBOOK_NEIGHBORS, lens_html
from tl_latentlens.views.page import lens_page
from tl_latentlens.views.strip import STRIP_WORDS
from tl_latentlens.views.terminal.layout import plain_text
from tl_latentlens.views.terminal.lens import lens_tables
from tl_latentlens.views.text import visible


@dataclass(frozen=True)
class LensResult:
    """Neighbors, and logit-lens tokens beside them, for each hook name and each decoded token of a run.

    Attributes:
        hook_names: The decoded hook names, in forward order.
        tokens: [batch][pos] texts of the input; None where the run's tokens were not known.
        decoded: True at the positions that were decoded, [batch, pos]; the entries of `found` and of the lenses follow
            its True cells in reading order.
        found: Hook name → neighbors of each decoded token.
        logit_lens: Hook name → tokens that the model's own unembedding reads; empty without that lens.
        embedding_lens: Hook name → tokens of the nearest input embeddings; empty without that lens.
        is_special: True at tokens that are no text: padding, BOS and other special tokens, placeholders of images,
            [batch, pos]; None where the run's tokens were not known.
        words: Hook name → nearest other words of each decoded token; empty where they were not asked for.
        around: Hook name → words around the nearest uses of each decoded token; a hook name that the index does not hold is
            left out.
    """

    hook_names: tuple[str, ...]
    tokens: list[list[str]] | None
    decoded: Bool[np.ndarray, "batch pos"]
    found: dict[str, SearchResult] = field(repr=False)
    logit_lens: dict[str, TokenReading] = field(repr=False)
    embedding_lens: dict[str, TokenReading] = field(repr=False)
    is_special: Bool[np.ndarray, "batch pos"] | None = field(default=None, repr=False)
    words: dict[str, WordSearchResult] = field(default_factory=dict, repr=False)
    around: dict[str, list[list[str]]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return plain_text(self.to_rich())

    @cached_property
    def positions(self) -> Int[np.ndarray, "cells 2"]:
        """(batch, pos) of each decoded token, in reading order."""
        return np.argwhere(self.decoded)

    def cell(self, hook_name: int | str, pos: int, batch: int = 0) -> Cell:
        """The neighbors, and the tokens of the other lenses, at one hook name, or layer, and position.

        Negative positions count from the end.

        Raises:
            UnknownHookError: The hook name was not decoded.
            InvalidInputError: The position was not decoded (padding, BOS, or not selected).
        """
        if self.found and is_layer_choice(hook_name):
            hook_name = one_hook_name(hook_name, next(iter(self.found.values())).index.model_info.n_layers)
        if hook_name not in self.found:
            raise UnknownHookError(f"{hook_name!r} was not decoded; decoded hook names: {list(self.hook_names)}")
        return self._cell(str(hook_name), self.place(pos, batch))

    def place(self, pos: int, batch: int = 0) -> int:
        """The number of a position among `positions`; negative ones count from the end.

        Raises:
            InvalidInputError: The position was not decoded (padding, BOS, or not selected).
        """
        pos = pos + self.decoded.shape[1] if pos < 0 else pos
        cell_ids = np.flatnonzero((self.positions == (batch, pos)).all(-1))
        if not len(cell_ids):
            raise InvalidInputError(why_not_decoded(self.decoded, pos, batch))
        return int(cell_ids[0])

    @property
    def text_tokens(self) -> list[list[str]]:
        """[batch][pos] texts of the input, empty at special tokens; no lists where the run's tokens were not known."""
        is_special = np.zeros(self.decoded.shape, bool) if self.is_special is None else self.is_special & ~self.decoded
        lines = zip(self.tokens or [], is_special, strict=False)
        return [["" if skip else token for token, skip in zip(tokens, skipped, strict=True)] for tokens, skipped in lines]

    def token(self, batch: int, pos: int) -> str | None:
        """The input token at a position; None where the run's tokens were not known."""
        return None if self.tokens is None else self.tokens[batch][pos]

    def cells(self) -> list[Cell]:
        """Every cell: hook names in order, within each the tokens in reading order."""
        return list(self.iter_cells())

    def iter_cells(self) -> Iterator[Cell]:
        """The cells one by one, for results too large to build at once."""
        return (self._cell(name, i) for name in self.hook_names for i in range(len(self.positions)))

    def _cell(self, hook_name: str, i: int) -> Cell:
        batch, pos = self.positions[i].tolist()
        found = self.found[hook_name]
        return Cell(
            hook_name,
            batch,
            pos,
            self.token(batch, pos),
            found.neighbors_of(i),
            *(readings[hook_name].token_scores(i) if hook_name in readings else None for readings in self._readings().values()),
            known=found.known_of(i),
            use_chance=found.use_chance_of(i),
            words=self.words[hook_name].words_of(i) if hook_name in self.words else None,
            around=self.around[hook_name][i] if hook_name in self.around else None,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One line for each hook name, token and rank.

        Columns: hook_name, batch, pos, token, rank (from 1), neighbor, similarity, context, neighbor_hook_name,
        neighbor_hook_names, neighbor_row, neighbor_prompt_index, neighbor_position; chance, known, use_chance, words and around
        where they were computed;
        logit_token and logit_probability, embedding_token and embedding_similarity where those lenses read.
        """
        return table_of_cells(self.iter_cells())

    def plot(self, batch: int = 0, lens: str | None = None) -> Any:
        """A layer × position heatmap (a plotly Figure), layers upwards, with buttons that switch between the lenses.

        Cells show the nearest other word ("·" where there is none), the word of the nearest neighbor, the first word around, or
        another lens's first token; words are faint where the bank does not know the token (`calibrate`). Color is `known` where
        the result is calibrated, else the cosine of the nearest neighbor; of another lens its probability or cosine. The hover
        shows words, neighbors in context, with a mark where the next is much further, and every lens's tokens.

        Args:
            batch: Which text.
            lens: Shown first: "words", "latentlens", "around", "logit_lens" or "embedding_lens"; None: other words where they
                were read.

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidInputError: Nothing was decoded of that text, or the lens was not read.
        """
        return heatmap(self.grid(batch), lens)

    def plot_lenses(self, batch: int = 0) -> Any:
        """The heatmaps of `plot` for each lens that was read, one above the other on one axis of positions.

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidInputError: Nothing was decoded of that text.
        """
        return heatmaps(self.grid(batch))

    def to_html(self, path: str | Path, *, call: str = "") -> Path:
        """Write one page that needs no network and no plotly: a layer × token table, and the neighbors of the cell clicked.

        All texts of the batch are in it, and a switch between the lenses. It follows the light or dark setting of its reader.

        Args:
            path: The file.
            call: The command that made the reading, for the page's head; empty: the call of `latentlens_hooks`.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder, or nothing was decoded.
        """
        path = output_path(path)
        path.write_text(self.page(call=call), encoding="utf-8")
        return path

    def page(self, *, call: str = "") -> str:
        """The page that `to_html` writes."""
        grids = list(map(self.grid, self._batches()))
        return lens_page(grids, reading_head(self.found, self.words, grids, call=call))

    def _repr_html_(self) -> str:
        grids = (self.grid(batch) for batch in self._batches())
        token_by_token = ((name, i) for i in range(len(self.positions)) for name in self.hook_names)
        cells = (self._lens_cell(name, i, NOTEBOOK_NEIGHBORS) for name, i in token_by_token)
        return lens_html(grids, cells, len(self.hook_names) * len(self.positions))

    def to_rich(
        self, neighbors: int | None = None, positions: Iterable[tuple[int, int]] | None = None, *, width: int | None = None
    ) -> Group:
        """Tables for the terminal (`rich.print`), one for each decoded token: a line a hook name.

        Args:
            neighbors: Most neighbors, and tokens of the other lenses, at each hook name; None: all that were read.
            positions: Show only these (batch, pos); None: all that were decoded.
            width: Of a table, in characters; None: the terminal's.

        Raises:
            InvalidInputError: A position that was not decoded.
        """
        shown = [tuple(place) for place in self.positions.tolist()] if positions is None else positions
        tokens = []
        for batch, pos in shown:
            i = self.place(pos, batch)
            cells = [self._lens_cell(name, i, neighbors) for name in self.hook_names]
            tokens.append((self.token_heading(batch, pos), cells))
        return lens_tables(tokens, width)

    def lens_cell(self, hook_name: str, pos: int, batch: int = 0, n_neighbors: int | None = None) -> LensCell:
        """One cell as views draw it, with at most so many neighbors, and tokens of the other lenses; None: all.

        Raises:
            InvalidInputError: The position was not decoded.
        """
        return self._lens_cell(hook_name, self.place(pos, batch), n_neighbors)

    def _lens_cell(self, hook_name: str, i: int, n_neighbors: int | None) -> LensCell:
        batch, pos = self.positions[i].tolist()
        found = self.found[hook_name]
        lenses = {
            lens: readings[hook_name].token_scores(i)[:n_neighbors]
            for lens, readings in self._readings().items()
            if hook_name in readings
        }
        neighbors = found.neighbor_lines(i, n_neighbors)
        token = self.token(batch, pos)
        words = self.words[hook_name].texts_of(i) if hook_name in self.words else None
        around = self.around[hook_name][i] if hook_name in self.around else None
        figures = found.known_of(i), found.use_chance_of(i)
        return LensCell(hook_name, batch, pos, token, neighbors, lenses, *figures, words, around)

    def word_strip(self, position_or_word: int | str, batch: int = 0, *, n_words: int = STRIP_WORDS) -> WordStrip:
        """The nearest other words of one token over all layers: where its meaning emerges.

        Layers that share at least half of their words stand in one line.

        Args:
            position_or_word: A position, negative to count from the end; or a word of the text, in any case, whose last
                occurrence is meant, at the token that ends it.
            batch: Which text.
            n_words: How many words count, and are shown.

        Raises:
            InvalidInputError: Other words were not read, the text has no such word, or the position was not decoded.
        """
        i = self.place(position_of(position_or_word, self.text_tokens, batch), batch)
        found, (batch, pos) = {name: self.found[name] for name in self.hook_names}, self.positions[i].tolist()
        word = position_or_word if isinstance(position_or_word, str) else None
        return word_strip(found, self.words, i, (batch, pos), self.token_heading(batch, pos), word, n_words)

    def token_heading(self, batch: int, pos: int) -> TokenHeading:
        """The place of a token and the text around it, as views draw them."""
        label = f"batch {batch}, pos {pos}" if len(self.decoded) > 1 else f"pos {pos}"
        shown = None if self.tokens is None else token_in_text(self.tokens[batch], self.text_tokens[batch], pos)
        return TokenHeading(label, shown)

    def grid(self, batch: int) -> LensGrid:
        """The cells of one text as arrays, as views draw them.

        Raises:
            InvalidInputError: Nothing was decoded of it.
        """
        cell_ids = np.flatnonzero(self.positions[:, 0] == batch)
        if not len(cell_ids):
            raise InvalidInputError(f"nothing was decoded of batch {batch}; decoded: {self._batches()}")
        positions = self.positions[cell_ids, 1].tolist()
        return text_grid(
            {name: self.found[name] for name in self.hook_names},
            self.words,
            self.around,
            self._readings(),
            cell_ids,
            batch=batch,
            positions=positions,
            tokens=[visible(self.token(batch, pos)) for pos in positions],
        )

    def _readings(self) -> dict[str, dict[str, TokenReading]]:
        """Lens → hook name → what the lens reads."""
        return {"logit_lens": self.logit_lens, "embedding_lens": self.embedding_lens}

    def _batches(self) -> list[int]:
        """The texts of which something was decoded."""
        return np.unique(self.positions[:, 0]).tolist()
