"""One word that is near a vector."""

from dataclasses import dataclass

from tl_latentlens.index.neighbor import Neighbor


@dataclass(frozen=True)
class NearWord:
    """One word that is near a vector: the nearest of the rows that end it or an inflection of it.

    Attributes:
        word: The word, in lower case, subwords merged.
        similarity: Cosine of that row, in [-1, 1].
        chance: How likely a random activation comes as near to it, in (0, 1]; None where it was not asked for.
        neighbor: That row.
    """

    word: str
    similarity: float
    chance: float | None
    neighbor: Neighbor
