"""Chosen tokens and words through the layers of a run: how likely, how near and of which rank each lens finds them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Num

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.followed import token_curves
from tl_latentlens.views.grids import FollowedGrid
from tl_latentlens.views.notebook import NOTEBOOK_EXAMPLES, followed_html
from tl_latentlens.views.terminal.layout import terminal_width


@dataclass(frozen=True)
class TokenRanks:
    """The scores and ranks of chosen tokens in what a lens reads from vectors.

    Attributes:
        scores: Probabilities (logit lens) or shares of the nearest rows (LatentLens) in [0, 1], cosines in [-1, 1]
            (embedding lens), [n, tokens].
        ranks: 1 for the first; NaN where LatentLens did not find the token, [n, tokens].
    """

    scores: Float[np.ndarray, "n tokens"]
    ranks: Num[np.ndarray, "n tokens"]


def neighbor_ranks(found: Int[np.ndarray, "... k"], token_ids: Sequence[int]) -> TokenRanks:
    """Share of the nearest rows that are of each chosen token, and the place of the first of them.

    Args:
        found: The token id of each of the nearest rows, nearest first.
        token_ids: The chosen tokens.
    """
    return _shares_and_places(found.reshape(-1, 1, found.shape[-1]) == np.asarray(token_ids)[:, None])


def context_ranks(holds: Bool[np.ndarray, "... k words"]) -> TokenRanks:
    """Share of the nearest rows whose context holds each chosen word, and the place of the first of them.

    Args:
        holds: True where the context of one of the nearest rows holds a word, nearest first.
    """
    return _shares_and_places(holds.reshape(-1, *holds.shape[-2:]).swapaxes(-1, -2))


def _shares_and_places(is_found: Bool[np.ndarray, "n tokens k"]) -> TokenRanks:
    return TokenRanks(is_found.mean(-1), np.where(is_found.any(-1), is_found.argmax(-1) + 1.0, np.nan))


COLUMNS = {
    "contexts": ("context_share", "context_rank"),
    "latentlens": ("neighbor_share", "neighbor_rank"),
    "logit_lens": ("logit_probability", "logit_rank"),
    "embedding_lens": ("embedding_similarity", "embedding_rank"),
}


@dataclass(frozen=True, eq=False)
class FollowedTokens:
    """Chosen tokens, or words, at every layer and decoded position of a run, by each lens that read it.

    Attributes:
        tokens: The tokens, leading spaces included, or the words.
        result: The run; every [cells, tokens] below follows its `positions`.
        top_k: How many of the nearest rows `latentlens` counts in.
        latentlens: Hook name → share of the `top_k` nearest rows that are of the token, and the place of the first of them;
            empty for words.
        logit_lens: Hook name → probability as the next token, and rank in the vocabulary; empty where it was not read.
        embedding_lens: Hook name → cosine with the input embedding, and rank in the vocabulary; empty where it was not read.
        contexts: Hook name → share of the `top_k` nearest rows whose context holds the word, and the place of the first of
            them; empty for tokens.
    """

    tokens: tuple[str, ...]
    result: LensResult
    top_k: int
    latentlens: dict[str, TokenRanks] = field(repr=False)
    logit_lens: dict[str, TokenRanks] = field(repr=False)
    embedding_lens: dict[str, TokenRanks] = field(repr=False)
    contexts: dict[str, TokenRanks] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"FollowedTokens({list(self.tokens)}, {len(self.result.hook_names)} hook names)"

    def __str__(self) -> str:
        return self.at().to_string(index=False, line_width=terminal_width(None))

    def _repr_html_(self) -> str:
        batches = np.unique(self.result.positions[:, 0]).tolist()
        return followed_html([self._grid(None, batch) for batch in batches[:NOTEBOOK_EXAMPLES]], len(batches))

    @property
    def lenses(self) -> list[str]:
        """The lenses that were read, LatentLens first; "contexts" alone for words."""
        return [lens for lens in COLUMNS if getattr(self, lens)]

    def to_dataframe(self) -> pd.DataFrame:
        """One line for each hook name, decoded position and chosen token.

        Columns: hook_name, batch, pos, token, followed (the chosen token or word); of tokens neighbor_share and neighbor_rank,
        logit_probability and logit_rank, embedding_similarity and embedding_rank where those lenses read; of words
        context_share and context_rank. Ranks count from 1; neighbor_rank and context_rank are missing where none of the nearest
        rows is of the token, or holds the word.
        """
        return self._frame(np.arange(len(self.result.positions)))

    def at(self, pos: int | None = None, batch: int = 0) -> pd.DataFrame:
        """The lines of `to_dataframe` at one position; negative ones count from the end, None is the text's last decoded.

        Raises:
            InvalidInputError: The position was not decoded.
        """
        return self._frame(np.array([self._place(pos, batch)]))

    def plot(self, pos: int | None = None, batch: int = 0, by: str = "score") -> Any:
        """Curves over the layers at one position (a plotly Figure): a panel for each lens, a line for each token.

        Args:
            pos: Which position, as in `at`.
            batch: Which text.
            by: "score" for probability, share of the nearest rows and cosine; "rank" for ranks, 1 on top.

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidInputError: The position was not decoded, or another `by`.
        """
        return token_curves(self._grid(pos, batch), by)

    def _grid(self, pos: int | None, batch: int) -> FollowedGrid:
        """One position as views draw it."""
        cell = self._place(pos, batch)
        batch_id, token_pos = self.result.positions[cell].tolist()
        missing = TokenRanks(*np.full((2, cell + 1, len(self.tokens)), np.nan))
        names = self.result.hook_names
        read = {lens: [getattr(self, lens).get(name, missing) for name in names] for lens in self.lenses}
        return FollowedGrid(
            batch=batch_id,
            pos=token_pos,
            token=self.result.token(batch_id, token_pos),
            hook_names=names,
            followed=self.tokens,
            top_k=self.top_k,
            scores={
                lens: np.stack([ranks.scores[cell] for ranks in layers]).astype(np.float64) for lens, layers in read.items()
            },
            ranks={lens: np.stack([ranks.ranks[cell] for ranks in layers]).astype(np.float64) for lens, layers in read.items()},
        )

    def _place(self, pos: int | None, batch: int) -> int:
        cell_ids = np.flatnonzero(self.result.positions[:, 0] == batch)
        if pos is None and len(cell_ids):
            return int(cell_ids[-1])
        if pos is None:
            raise InvalidInputError(f"nothing was decoded of batch {batch}")
        return self.result.place(pos, batch)

    def _frame(self, cells: Int[np.ndarray, " n"]) -> pd.DataFrame:
        names, chosen = np.array(self.result.hook_names, object), np.array(self.tokens, object)
        places = [(batch, pos, self.result.token(batch, pos)) for batch, pos in self.result.positions[cells].tolist()]
        frame = pd.DataFrame(
            [place for place in places for _ in chosen] * len(names), columns=["batch", "pos", "token"]
        )  # hook names outermost, then positions, then the chosen tokens
        frame.insert(0, "hook_name", np.repeat(names, len(cells) * len(chosen)))
        frame["followed"] = np.tile(chosen, len(cells) * len(names))
        missing = np.full((len(cells), len(chosen)), np.nan)
        for lens in self.lenses:
            read = getattr(self, lens)
            for column, part in zip(COLUMNS[lens], ("scores", "ranks"), strict=True):
                values = [getattr(read[name], part)[cells] if name in read else missing for name in names]
                frame[column] = np.concatenate(values).ravel()
        ranks = {column: "Int64" for lens in self.lenses for column in COLUMNS[lens][1:]}
        return frame.astype(ranks)
