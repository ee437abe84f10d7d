"""Which components write what a word means in its context."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_latentlens.index.contextual import SearchResult
from tl_latentlens.index.neighbor import Neighbor


@dataclass(frozen=True, eq=False)
class Meaning:
    """What a word means in its context: what this use shares with the nearest other uses of its token, and others lack.

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

    def alike(self) -> list[Neighbor]:
        """The nearest other uses of the token."""
        index = self.found.index
        pairs = zip(self.alike_rows.tolist(), self.alike_cosines.tolist(), strict=True)
        return [index.neighbor(row, index.hook_names.index(self.hook_name), cosine) for row, cosine in pairs]

    def neighbors(self) -> list[Neighbor]:
        """The rows nearest to the direction."""
        return self.found.neighbors_of(0)


@dataclass(frozen=True, eq=False)
class FindResult:
    """Components that write what a word means in its context, the largest share first.

    Attributes:
        kind: "feature", "head" or "neuron".
        meaning: What the word means here, and what it was compared with.
        table: A line a component: what it is, contribution, usual, share, beats_null, why_not, and p, z and n against both
            nulls (_same_token, _random).
        parts: What all components of a kind add up to, as shares of the whole; they sum to 1.
        found: Neighbors of what each line's component writes.
    """

    kind: str
    meaning: Meaning
    table: pd.DataFrame = field(repr=False)
    parts: dict[str, float]
    found: SearchResult = field(repr=False)

    def __str__(self) -> str:
        from tl_latentlens.views.found import find_text

        return find_text(self)

    def neighbors(self, line: int) -> list[Neighbor]:
        """The rows nearest to what the component of a line of the table writes."""
        return self.found.neighbors_of(line)

    def to_dataframe(self) -> pd.DataFrame:
        """The table, with rank (from 1), and the nearest row's similarity and context."""
        nearest = [self.neighbors(line)[0] for line in range(len(self.table))]
        table = self.table.assign(similarity=[n.similarity for n in nearest], nearest=[n.context for n in nearest])
        table.insert(0, "rank", range(1, len(table) + 1))
        return table
