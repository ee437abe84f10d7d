"""Plain data that views draw, save grids, which are in `grids`.

A result class builds the data and calls the view. No view knows a bank, an index or a model.
"""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_latentlens.views.context import Context
from tl_latentlens.views.label_kinds import MIXED


@dataclass(frozen=True)
class NeighborLine:
    """One neighbor, as a line of a list.

    Attributes:
        context: The found token in its text.
        similarity: Cosine in [-1, 1].
        chance: How likely a random activation comes as near, in (0, 1]; None where it was not computed.
        hook_name: The hook name whose vector was found; where the row was found at several, the best.
        row: Its row in the index.
        prompt_index: Its text of the corpus.
        hook_names: All hook names at which the row was found, the best first.
    """

    context: Context
    similarity: float
    chance: float | None
    hook_name: str
    row: int
    prompt_index: int
    hook_names: tuple[str, ...] = ()


TokenScores = list[tuple[str, float]]
"""Vocabulary tokens and their scores, best first."""


@dataclass(frozen=True)
class TokenReading:
    """Vocabulary tokens that a lens reads from vectors, best first.

    Attributes:
        token_ids: [n, k].
        scores: Probabilities in [0, 1] (logit lens), logits, or cosines in [-1, 1] (embedding lens), [n, k].
        strings: The text of each token id that occurs.
    """

    token_ids: Int[np.ndarray, "n k"]
    scores: Float[np.ndarray, "n k"]
    strings: dict[int, str] = field(repr=False)

    def tokens(self, row: int) -> list[str]:
        """The texts of one vector's tokens."""
        return [self.strings[i] for i in self.token_ids[row].tolist()]

    def token_scores(self, row: int) -> TokenScores:
        """The texts of one vector's tokens, with their scores."""
        return list(zip(self.tokens(row), self.scores[row].tolist(), strict=True))

    def select(self, rows: Int[np.ndarray, " some"]) -> "TokenReading":
        """The reading of some of the vectors."""
        return TokenReading(self.token_ids[rows], self.scores[rows], self.strings)


@dataclass(frozen=True)
class LensCell:
    """The readings of all lenses at one hook name and token.

    Attributes:
        hook_name: The hooked activation.
        batch, pos: Where the token stands.
        token: The token; None where the run's tokens were not known.
        neighbors: Nearest contextual tokens, nearest first.
        lenses: Lens → tokens and scores; a lens that did not read is left out.
        known: How well the bank knows the token, in (0, 1]; None where it was not computed.
        use_chance: How likely another use of the token comes as near to the nearest row, in (0, 1]; None where that is another
            token, or it was not computed.
        words: Nearest other words; None where they were not asked for.
        around: Words that stand near the nearest uses of the token and not near its other uses; like `words`.
    """

    hook_name: str
    batch: int
    pos: int
    token: str | None
    neighbors: list[NeighborLine]
    lenses: dict[str, TokenScores]
    known: float | None = None
    use_chance: float | None = None
    words: list[str] | None = None
    around: list[str] | None = None


@dataclass(frozen=True)
class TokenHeading:
    """The token that a table is about.

    Attributes:
        label: Where it stands, such as "batch 0, pos 3".
        context: The token in its text; None where the run's tokens were not known.
    """

    label: str
    context: Context | None


@dataclass(frozen=True)
class PropertyTable:
    """The contents of an object, in a few lines.

    Attributes:
        title: What it is.
        properties: Name → text; a list of texts is joined, and cut where it is long.
        examples: A few rows in context.
    """

    title: str
    properties: dict[str, str | list[str]]
    examples: list[Context]


@dataclass(frozen=True)
class DirectionNearness:
    """How near the neighbors of a direction are.

    Attributes:
        z: Above random rows, in their standard deviations.
        p: The share of random directions whose neighbors are at least as near, in (0, 1].
    """

    z: float
    p: float


@dataclass(frozen=True)
class DirectionEnd:
    """One end of a direction.

    Attributes:
        neighbors: The nearest rows.
        nearness: How near they are; None where it was not asked for.
    """

    neighbors: list[NeighborLine]
    nearness: DirectionNearness | None


@dataclass(frozen=True)
class DirectionLine:
    """One direction.

    Attributes:
        name: What it is called.
        positive, negative: The rows nearest to +v and to -v.
        transform: How it was compared with the rows.
    """

    name: str
    positive: DirectionEnd
    negative: DirectionEnd
    transform: str


@dataclass(frozen=True)
class FeatureLine:
    """One SAE feature.

    Attributes:
        feature: Its number.
        label: Its label; empty where it has none.
        kind: The kind of its label; "mixed" where it names nothing, empty where it has none.
        why_not: What kept the label back; empty where it has one.
        writes: The words nearest to its decoder direction.
        scores: Column of the feature table → value; NaN where unknown.
        neighbors: The rows nearest to its decoder direction; empty where that is zero.
    """

    feature: int
    label: str
    kind: str
    why_not: str
    writes: list[str]
    scores: dict[str, float]
    neighbors: list[NeighborLine]

    @property
    def is_named(self) -> bool:
        """Whether it has a label that names something."""
        return self.kind not in ("", MIXED)


@dataclass(frozen=True, eq=False)
class MeasurePanel:
    """One measure of an evaluation.

    Attributes:
        name: What is measured, with its unit.
        unit: What a value belongs to.
        lower_is_better: True for distances.
        table: A line for each reader and hook name: hook_name, reader, mean, low, high, n.
        kind: What the means are: "mean", "share" or "geometric mean".
        about: What is measured, and what each null is; empty where it is not said.
    """

    name: str
    unit: str
    lower_is_better: bool
    table: pd.DataFrame
    kind: str = "mean"
    about: str = ""


@dataclass(frozen=True)
class WordReading:
    """A word in its text, and the rows that show what is meant.

    Attributes:
        context: The word in its text.
        note: Where it was read, and what the rows are.
        neighbors: The rows, nearest first.
        hook_name: The hook name that was read.
    """

    context: Context
    note: str
    neighbors: list[NeighborLine]
    hook_name: str


@dataclass(frozen=True)
class SteeringCell:
    """The readings at one hook name under one multiple of a steering vector.

    Attributes:
        cell: What the lenses read.
        cosine_to_unsteered: Cosine of the activation with the unsteered one, in [-1, 1]; None where it is not known.
    """

    cell: LensCell
    cosine_to_unsteered: float | None


@dataclass(frozen=True)
class SteeringColumn:
    """The readings at one token of a text under one multiple of a steering vector.

    Attributes:
        multiple: The multiple; 0: unsteered.
        heading: The token that was read.
        cells: Hook name → what was read; a hook name that did not run is left out.
    """

    multiple: float
    heading: TokenHeading
    cells: dict[str, SteeringCell]
