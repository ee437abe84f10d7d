"""Components that write what a word means in its context, as `find_*` return them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.views.context import Context
from tl_latentlens.views.data import WordReading
from tl_latentlens.views.terminal.components import component_table, word_lines
from tl_latentlens.views.terminal.layout import plain_text
from tl_latentlens.views.text import place_name


@dataclass(frozen=True, eq=False)
class Meaning:
    """The meaning of a word in its context: what this use shares with the nearest other uses of its token, and others lack.

    Attributes:
        tokens: The text up to the word, which is the last, BOS included.
        hook_name: The activation that was read.
        direction: m, [d], of length 1.
        strength: How much more of m the activation has than the uses it is compared with, in its own units.
        alike_rows: Rows of the nearest other uses, nearest first; empty where `by_token` is False.
        alike_cosines: Their cosines to this use, both less the mean of all uses.
        n_uses: Uses of another kind, with which it is compared.
        by_token: False where the bank has too few uses of the token: m is then the activation less the bank's mean.
        found: Neighbors of the direction.
        is_special: True at tokens that are no text, such as BOS; None: at none.
    """

    tokens: list[str]
    hook_name: str
    direction: Float[np.ndarray, " d"] = field(repr=False)
    strength: float
    alike_rows: Int[np.ndarray, " alike"] = field(repr=False)
    alike_cosines: Float[np.ndarray, " alike"] = field(repr=False)
    n_uses: int
    by_token: bool
    found: SearchResult = field(repr=False)
    is_special: Bool[np.ndarray, " pos"] | None = field(default=None, repr=False)

    def alike(self) -> list[Neighbor]:
        """The nearest other uses of the token."""
        return [self.found.index.neighbor(row, hook_id, cosine) for row, hook_id, cosine in self._alike_hits()]

    def neighbors(self) -> list[Neighbor]:
        """The rows nearest to the direction."""
        return self.found.neighbors_of(0)

    def to_rich(self, neighbors: int = 3, *, width: int | None = None) -> Text:
        """Lines for the terminal (`rich.print`): the word in its text, and the uses of its token that show what is meant.

        Args:
            neighbors: Most uses.
            width: In characters; None: the terminal's.
        """
        place = f"read at {place_name(self.hook_name)}"
        if self.by_token:
            note = f"{place}: what these uses share, and {self.n_uses} others lack"
            lines = [self.found.index.neighbor_line(row, hook_id, cosine) for row, hook_id, cosine in self._alike_hits()]
        else:
            note = f"{place}; only {self.n_uses} other uses of the token: compared with the mean of all tokens"
            lines = self.found.neighbor_lines(0)
        return word_lines(WordReading(self._context(), note, lines[:neighbors], self.hook_name), width)

    def _alike_hits(self) -> Iterator[tuple[int, int, float]]:
        """Row, place of the hook name in the index, and cosine of the nearest other uses."""
        hook_id = self.found.index.hook_names.index(self.hook_name)
        pairs = zip(self.alike_rows.tolist(), self.alike_cosines.tolist(), strict=True)
        return ((row, hook_id, cosine) for row, cosine in pairs)

    def _context(self) -> Context:
        """The word in its text, without special tokens."""
        special = np.zeros(len(self.tokens), bool) if self.is_special is None else self.is_special
        tokens = [token.replace("\n", "↵") for token, is_special in zip(self.tokens, special, strict=True) if not is_special]
        context = Context.around("".join(tokens[:-1]), tokens[-1], "")
        return Context(context.before.lstrip(), context.token, "")


@dataclass(frozen=True, eq=False)
class FindResult:
    """Components that write what a word means in its context, the largest share first.

    Attributes:
        kind: "feature", "head" or "neuron".
        meaning: What the word means here, and what it was compared with.
        table: A line a component: what it is, contribution, usual, share, beats_null, why_not, p, z and n against both nulls of
            its own (_same_token, _random), and p and n among all components (_family).
        parts: What all components of a kind add up to, as shares of the whole; they sum to 1.
        found: Neighbors of what each line's component writes.
    """

    kind: str
    meaning: Meaning
    table: pd.DataFrame = field(repr=False)
    parts: dict[str, float]
    found: SearchResult = field(repr=False)

    def __str__(self) -> str:
        return plain_text(Group(self.meaning.to_rich(), self.to_rich()))

    def to_rich(self, *, width: int | None = None) -> Table:
        """A table for the terminal (`rich.print`): a line a component.

        Args:
            width: In characters; None: the terminal's. In a narrow one some columns are left out.
        """
        nearest = [self.found.neighbor_lines(line, 1)[0] for line in range(len(self.table))]
        return component_table(self.table, self.parts, nearest, self.found.index.transform, width)

    def neighbors(self, line: int) -> list[Neighbor]:
        """The rows nearest to what the component of a line of the table writes."""
        return self.found.neighbors_of(line)

    def to_dataframe(self) -> pd.DataFrame:
        """The table, with rank (from 1), and the nearest row's similarity and context."""
        nearest = [self.neighbors(line)[0] for line in range(len(self.table))]
        table = self.table.assign(similarity=[n.similarity for n in nearest], nearest=[n.context for n in nearest])
        table.insert(0, "rank", range(1, len(table) + 1))
        table.attrs["transform"] = self.found.index.transform
        return table
