"""What a search or a lens found, as frozen data; text is built only when it is asked for."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from tl_latentlens.errors import InvalidInputError, MissingExtraError, UnknownHookError
from tl_latentlens.index.contextual import SearchResult
from tl_latentlens.index.neighbor import Neighbor


@dataclass(frozen=True)
class TokenReading:
    """Vocabulary tokens that a lens reads from vectors, best first.

    Attributes:
        token_ids: [n, k].
        scores: Probabilities in [0, 1] (logit lens) or cosines in [-1, 1] (embedding lens), [n, k].
        strings: The text of each token id that occurs.
    """

    token_ids: Int[np.ndarray, "n k"]
    scores: Float[np.ndarray, "n k"]
    strings: dict[int, str] = field(repr=False)

    def tokens(self, row: int) -> list[str]:
        """The texts of one vector's tokens."""
        return [self.strings[i] for i in self.token_ids[row].tolist()]


@dataclass(frozen=True)
class Cell:
    """What the lenses read at one hook name and token.

    Attributes:
        hook_name: The hooked activation.
        batch, pos: Where it stood.
        token: The input token there, or None where the run's tokens were not known.
        neighbors: Nearest contextual tokens, nearest first.
        logit_lens, embedding_lens: (token, score) pairs, best first; None where that lens did not read.
    """

    hook_name: str
    batch: int
    pos: int
    token: str | None
    neighbors: list[Neighbor]
    logit_lens: list[tuple[str, float]] | None
    embedding_lens: list[tuple[str, float]] | None


_COLUMNS = [
    "hook_name", "batch", "pos", "token", "rank", "neighbor", "similarity", "context", "neighbor_hook_name", "neighbor_row",
    "neighbor_prompt_index", "neighbor_position",
]  # fmt: skip


@dataclass(frozen=True)
class LensResult:
    """Neighbors, and logit-lens tokens beside them, for each hook name and each decoded token of a run.

    Attributes:
        hook_names: The decoded hook names, in forward order.
        tokens: [batch][pos] texts of the input; None where the run's tokens were not known.
        decoded: True at the positions that were decoded, [batch, pos]; the entries of `found` and of the lenses follow
            its True cells in reading order.
        found: Hook name → neighbors of each decoded token.
        logit_lens: Hook name → what the model's own unembedding reads; empty where it was not asked for.
        embedding_lens: Hook name → nearest input embeddings; empty where it was not asked for.
    """

    hook_names: tuple[str, ...]
    tokens: list[list[str]] | None
    decoded: Bool[np.ndarray, "batch pos"]
    found: dict[str, SearchResult] = field(repr=False)
    logit_lens: dict[str, TokenReading] = field(repr=False)
    embedding_lens: dict[str, TokenReading] = field(repr=False)

    def __str__(self) -> str:
        from tl_latentlens.views.terminal import as_text

        return as_text(self)

    @cached_property
    def positions(self) -> Int[np.ndarray, "cells 2"]:
        """(batch, pos) of each decoded token, in reading order."""
        return np.argwhere(self.decoded)

    def cell(self, hook_name: str, pos: int, batch: int = 0) -> Cell:
        """What was read at one hook name and position; negative positions count from the end.

        Raises:
            UnknownHookError: The hook name was not decoded.
            InvalidInputError: The position was not decoded (padding, BOS, or not selected).
        """
        if hook_name not in self.found:
            raise UnknownHookError(f"{hook_name!r} was not decoded; decoded hook names: {list(self.hook_names)}")
        return self._cell(hook_name, self.place(pos, batch))

    def place(self, pos: int, batch: int = 0) -> int:
        """Which of `positions` a position is; negative ones count from the end.

        Raises:
            InvalidInputError: The position was not decoded (padding, BOS, or not selected).
        """
        pos = pos + self.decoded.shape[1] if pos < 0 else pos
        at = np.flatnonzero((self.positions == (batch, pos)).all(-1))
        if not len(at):
            raise InvalidInputError(f"batch {batch}, position {pos} was not decoded; decoded: {self.positions.tolist()}")
        return int(at[0])

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
        return Cell(
            hook_name,
            batch,
            pos,
            self.token(batch, pos),
            self.found[hook_name].neighbors_of(i),
            _pairs(self.logit_lens.get(hook_name), i),
            _pairs(self.embedding_lens.get(hook_name), i),
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One line for each hook name, token and rank.

        Columns: hook_name, batch, pos, token, rank (from 1), neighbor, similarity, context, neighbor_hook_name,
        neighbor_row, neighbor_prompt_index, neighbor_position; chance where it was asked for; logit_token and
        logit_probability, embedding_token and embedding_similarity where those lenses read.
        """
        lines: list[dict[str, Any]] = []
        for cell in self.cells():
            where = {"hook_name": cell.hook_name, "batch": cell.batch, "pos": cell.pos, "token": cell.token}
            for rank, neighbor in enumerate(cell.neighbors):
                line = {
                    **where,
                    "rank": rank + 1,
                    "neighbor": neighbor.token,
                    "similarity": neighbor.similarity,
                    "context": neighbor.context,
                    "neighbor_hook_name": neighbor.hook_name,
                    "neighbor_row": neighbor.row,
                    "neighbor_prompt_index": neighbor.prompt_index,
                    "neighbor_position": neighbor.position,
                    **({} if neighbor.chance is None else {"chance": neighbor.chance}),
                }
                if cell.logit_lens is not None and rank < len(cell.logit_lens):
                    line["logit_token"], line["logit_probability"] = cell.logit_lens[rank]
                if cell.embedding_lens is not None and rank < len(cell.embedding_lens):
                    line["embedding_token"], line["embedding_similarity"] = cell.embedding_lens[rank]
                lines.append(line)
        return pd.DataFrame(lines) if lines else pd.DataFrame(columns=_COLUMNS)

    def plot(self, batch: int = 0, lens: str = "latentlens") -> Any:
        """A layer × position heatmap (a plotly Figure), layers upwards, with buttons that switch between the lenses.

        Cells show the word of the nearest neighbor, faint where chance explains it (`calibrate=True`), or a lens's first
        token. Color is the cosine of the nearest neighbor, -log10 of its chance where the result is calibrated, or the
        token's probability or cosine. The hover shows neighbors in context and every lens's tokens.

        Args:
            batch: Which text.
            lens: Shown first: "latentlens", "logit_lens" or "embedding_lens".

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidInputError: Nothing was decoded of that text, or the lens was not read.
        """
        return _plotly().heatmap(self, batch, lens)

    def plot_lenses(self, batch: int = 0) -> Any:
        """The heatmaps of `plot` for each lens that was read, one above the other on one axis of positions.

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidInputError: Nothing was decoded of that text.
        """
        return _plotly().heatmaps(self, batch)

    def to_html(self, path: str | Path) -> Path:
        """Write one page that needs no network and no plotly: a layer × token table, and the neighbors of the cell clicked.

        All texts of the batch are in it, and a switch between the lenses. It follows the light or dark setting of its reader.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder, or nothing was decoded.
        """
        from tl_latentlens.views.page import write_page

        return write_page(self, path)

    def _repr_html_(self) -> str:
        from tl_latentlens.views.html import lens_html

        return lens_html(self)


def _plotly() -> Any:
    try:
        from tl_latentlens.views import heatmap
    except ImportError as error:
        raise MissingExtraError('plotting needs plotly: pip install "tl-latentlens[viz]"') from error
    return heatmap


def _pairs(reading: TokenReading | None, row: int) -> list[tuple[str, float]] | None:
    if reading is None:
        return None
    return list(zip(reading.tokens(row), reading.scores[row].tolist(), strict=True))
