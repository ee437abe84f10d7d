"""One cell of a lens result: what the lenses read at one hook name and token, and its lines in a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from tl_latentlens.index.near_word import NearWord
from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.views.context import Context

CELL_COLUMNS = [
    "hook_name", "batch", "pos", "token", "rank", "neighbor", "similarity", "context", "neighbor_hook_name",
    "neighbor_hook_names", "neighbor_row", "neighbor_prompt_index", "neighbor_position",
]  # fmt: skip
_OTHER_COLUMNS = [
    "chance", "known", "use_chance", "words", "around", "logit_token", "logit_probability", "embedding_token",
    "embedding_similarity",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """The readings of all lenses at one hook name and token.

    Attributes:
        hook_name: The hooked activation.
        batch, pos: Where the token stands.
        token: The input token there, or None where the run's tokens were not known.
        neighbors: Nearest contextual tokens, nearest first.
        words: Nearest other words, each once (`ContextualIndex.search_words`); None where they were not asked for.
        around: Words that stand around the nearest uses of the token and not around its other uses
            (`ContextualIndex.words_around`); None where they were not asked for, or the index does not hold the hook name.
        logit_lens, embedding_lens: (token, score) pairs, best first; None where that lens did not read.
        known: How well the bank knows the token, in (0, 1]; at most 0.05: it does not (`ContextualIndex.known`). None where
            it was not asked for, or the index does not hold the hook name.
        use_chance: How likely another use of the token comes as near to the nearest neighbor, in (0, 1]
            (`ContextualIndex.use_chances`); None where that is another token, or it was not asked for.
    """

    hook_name: str
    batch: int
    pos: int
    token: str | None
    neighbors: list[Neighbor]
    logit_lens: list[tuple[str, float]] | None
    embedding_lens: list[tuple[str, float]] | None
    known: float | None = None
    use_chance: float | None = None
    words: list[NearWord] | None = None
    around: list[str] | None = None

    def lines(self) -> list[dict[str, Any]]:
        """A line of a table for each neighbor: `CELL_COLUMNS`, the figures, `words`, `around` and the other lenses.

        Those that were not computed are left out. `known` is the same in each line of the cell. `use_chance`, and `words` and
        `around`, each with all words in one text, are in the first line.
        """
        lines = []
        for i, neighbor in enumerate(self.neighbors):
            line = {
                "hook_name": self.hook_name,
                "batch": self.batch,
                "pos": self.pos,
                "token": self.token,
                "rank": i + 1,
                "neighbor": neighbor.token,
                "similarity": neighbor.similarity,
                "context": neighbor.context,
                "neighbor_hook_name": neighbor.hook_name,
                "neighbor_hook_names": ", ".join(neighbor.hook_names),
                "neighbor_row": neighbor.row,
                "neighbor_prompt_index": neighbor.prompt_index,
                "neighbor_position": neighbor.position,
                **({} if neighbor.chance is None else {"chance": neighbor.chance}),
                **({} if self.known is None else {"known": self.known}),
                **({} if self.use_chance is None or i else {"use_chance": self.use_chance}),
                **({} if self.words is None or i else {"words": ", ".join(near.word for near in self.words)}),
                **({} if self.around is None or i else {"around": ", ".join(self.around)}),
            }
            if self.logit_lens is not None and i < len(self.logit_lens):
                line["logit_token"], line["logit_probability"] = self.logit_lens[i]
            if self.embedding_lens is not None and i < len(self.embedding_lens):
                line["embedding_token"], line["embedding_similarity"] = self.embedding_lens[i]
            lines.append(line)
        return lines


def table_of_cells(cells: Iterable[Cell]) -> pd.DataFrame:
    """The lines of some cells, with a column for each figure that one of them has."""
    table = pd.DataFrame([line for cell in cells for line in cell.lines()])
    return table.reindex(columns=CELL_COLUMNS + [name for name in _OTHER_COLUMNS if name in table])


def numbers_of_cells(numbers: Sequence[Tensor | None], n_cells: int) -> Float[np.ndarray, "names cells"] | None:
    """A figure of each hook name's cells, NaN where a hook name has none; None where none has."""
    if all(tensor is None for tensor in numbers):
        return None
    return np.stack([np.full(n_cells, np.nan, np.float32) if t is None else t.cpu().numpy() for t in numbers])


def words_of_cells(
    hook_names: Sequence[str], cell_ids: Int[np.ndarray, " cells"], words_of: Mapping[str, Callable[[int], list[str]]]
) -> list[list[list[str]]] | None:
    """The words of some cells, [hook name][cell], none for a hook name that has none; None where none has."""
    if not words_of:
        return None
    return [[words_of[name](i) if name in words_of else [] for i in cell_ids.tolist()] for name in hook_names]


def token_in_text(tokens: Sequence[str], text_tokens: Sequence[str], pos: int) -> Context:
    """A token with the text before and after it; line breaks are signs.

    Args:
        tokens: The tokens of the text.
        text_tokens: The same, empty at special tokens.
        pos: Which token.
    """
    before, after = "".join(text_tokens[:pos]), "".join(text_tokens[pos + 1 :])
    context = Context.around(before.replace("\n", "↵"), tokens[pos].replace("\n", "↵"), after.replace("\n", "↵"))
    return Context(context.before.lstrip(), context.token, context.after)
