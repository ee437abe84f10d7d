"""Plain data over layers and positions, or over the patches of an image, that views draw."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.views.context import Context
from tl_latentlens.views.data import TokenReading
from tl_latentlens.views.known import is_unknown
from tl_latentlens.views.lens_names import CONTEXT_LENSES, LENSES, NO_WORD
from tl_latentlens.views.text import visible

_WORD_WIDTH = 76  # A word is looked for in this many columns of text.

ContextLookup = Callable[[Iterable[int], int], dict[int, Context]]
"""Row numbers and a width → each row in its text, clipped to that width. Each view asks only for the rows it shows."""


@dataclass(frozen=True, eq=False)
class LensGrid:
    """One text: arrays are [hook name, pos, k] over the decoded positions, best first.

    Attributes:
        batch: Which text of the run.
        hook_names: The decoded hook names, in forward order.
        positions: The decoded positions.
        tokens: The input token at each, `visible`.
        found_hook_names: The hook names that `hook_ids` number.
        contexts: Looks rows up in their texts.
        rows, hook_ids, similarities: The neighbors.
        known: How well the bank knows each token, [hook name, pos], NaN for a hook name that the bank does not hold; None where
            it was not computed.
        use_chances: How likely another use of the token comes as near to the nearest row, NaN where that is another token;
            like `known`.
        readings: Lens → hook name → vocabulary tokens at each position; a lens that was not read is left out.
        words: The nearest other words, [hook name][pos]; None where they were not asked for.
        around: Words that stand near the nearest uses of the token and not near its other uses, like `words`.
        is_at: True for each of `found_hook_names` at which a row was found, [hook name, pos, k, found hook name]; None where
            rows are not listed once.
    """

    batch: int
    hook_names: tuple[str, ...]
    positions: list[int]
    tokens: list[str]
    found_hook_names: Sequence[str]
    contexts: ContextLookup = field(repr=False)
    rows: Int[np.ndarray, "names pos k"]
    hook_ids: Int[np.ndarray, "names pos k"]
    similarities: Float[np.ndarray, "names pos k"]
    known: Float[np.ndarray, "names pos"] | None
    use_chances: Float[np.ndarray, "names pos"] | None
    readings: dict[str, dict[str, TokenReading]]
    words: list[list[list[str]]] | None = None
    around: list[list[list[str]]] | None = None
    is_at: Bool[np.ndarray, "names pos k found"] | None = None

    @property
    def n_cells(self) -> int:
        """Hook names times positions."""
        return len(self.hook_names) * len(self.positions)

    @property
    def lenses(self) -> list[str]:
        """The keys of what was read, in the order of a switch: other words first, where they were asked for."""
        read = {"words": self.words is not None, "latentlens": True, "around": self.around is not None}
        return [lens for lens in LENSES if read.get(lens, lens in self.readings)]

    def score_name(self, lens: str) -> str:
        """The name of the score in `values`: "cosine", "probability" or "known"."""
        return "known" if lens in CONTEXT_LENSES and self._is_colored_by_known else LENSES[lens].score_name

    @cached_property
    def is_unknown(self) -> Bool[np.ndarray, "names pos"]:
        """True where the bank does not know the token."""
        return np.zeros(self.rows.shape[:2], bool) if self.known is None else is_unknown(self.known)

    @property
    def _is_colored_by_known(self) -> bool:
        """True where every cell has the figure."""
        return self.known is not None and not np.isnan(self.known).any()

    def values(self, lens: str) -> Float[np.ndarray, "names pos"]:
        """The numbers that color the cells; NaN where the lens did not read.

        For uses and words how well the bank knows the token, or the cosine of the nearest neighbor where that is not known of
        all cells; for another lens the score of its first token.
        """
        if lens in CONTEXT_LENSES:
            return self.known if self.known is not None and self._is_colored_by_known else self.similarities[..., 0]
        missing = np.full(len(self.positions), np.nan)
        readings = self.readings[lens]
        return np.stack([readings[name].scores[:, 0] if name in readings else missing for name in self.hook_names])

    def word_lists(self, lens: str) -> list[list[list[str]]]:
        """The other words ("words"), or the words around the uses ("around"), of each cell, [hook name][pos], `visible`."""
        lists = (self.words if lens == "words" else self.around) or []
        return [[list(map(visible, words)) for words in line] for line in lists]

    def first_tokens(self, lens: str) -> list[list[str]]:
        """The first word, or token of the vocabulary, that is read at each hook name and position, `visible`.

        Not for "latentlens", whose tokens stand in contexts. A cell without a word has "·".
        """
        if lens in CONTEXT_LENSES:
            return [[words[0] if words else NO_WORD for words in line] for line in self.word_lists(lens)]
        return [
            [visible(reading.strings[i]) for i in reading.token_ids[:, 0].tolist()] if reading else [""] * len(self.positions)
            for reading in map(self.readings[lens].get, self.hook_names)
        ]

    def row_words(self, rows: Int[np.ndarray, "..."]) -> dict[int, str]:
        """The word that the token of each row belongs to."""
        return {row: context.word for row, context in self.contexts(np.unique(rows).tolist(), _WORD_WIDTH).items()}

    def select_positions(self, columns: Int[np.ndarray, " some"]) -> "LensGrid":
        """The grid of some of its positions, counted among those that were decoded."""
        readings = {
            lens: {name: reading.select(columns) for name, reading in by_name.items()}
            for lens, by_name in self.readings.items()
        }
        return replace(
            self,
            positions=[self.positions[i] for i in columns],
            tokens=[self.tokens[i] for i in columns],
            rows=self.rows[:, columns],
            hook_ids=self.hook_ids[:, columns],
            similarities=self.similarities[:, columns],
            known=None if self.known is None else self.known[:, columns],
            use_chances=None if self.use_chances is None else self.use_chances[:, columns],
            readings=readings,
            words=_select(self.words, columns),
            around=_select(self.around, columns),
            is_at=None if self.is_at is None else self.is_at[:, columns],
        )

    def require_lens(self, lens: str) -> None:
        """Check that a lens was read.

        Raises:
            InvalidInputError: It was not, or there is none of that name.
        """
        if lens not in self.lenses:
            raise InvalidInputError(
                f"got lens={lens!r}; this result has {self.lenses}: "
                "latentlens_hooks(index, words=8, logit_lens=True, embedding_lens=True)"
            )


def _select(words: list[list[list[str]]] | None, columns: Int[np.ndarray, " some"]) -> list[list[list[str]]] | None:
    return None if words is None else [[of_name[i] for i in columns.tolist()] for of_name in words]


@dataclass(frozen=True, eq=False)
class FollowedGrid:
    """Chosen tokens at one position of a run: arrays are [hook name, token].

    Attributes:
        batch, pos: The position.
        token: The input token there; None where the run's tokens were not known.
        hook_names: The decoded hook names, in forward order.
        followed: The chosen tokens.
        top_k: How many of the nearest rows LatentLens counts in.
        scores: Lens → probability, cosine, or share of the nearest rows; NaN where the lens did not read.
        ranks: Lens → rank, 1 for the first; NaN where there is none.
    """

    batch: int
    pos: int
    token: str | None
    hook_names: tuple[str, ...]
    followed: tuple[str, ...]
    top_k: int
    scores: dict[str, Float[np.ndarray, "names tokens"]]
    ranks: dict[str, Float[np.ndarray, "names tokens"]]


Pixels = UInt8[np.ndarray, "height width 3"]
"""A picture, RGB."""


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """The patches of one image, with what was read of each.

    Attributes:
        pixels: The picture.
        width, height: Its size in the units of `boxes`.
        boxes: Left, top, right, bottom of each patch.
        places: Level, row and column of each patch.
        levels: What each level is called.
        grid: What was read: a position a patch.
    """

    pixels: Pixels
    width: float
    height: float
    boxes: Float[np.ndarray, "patches 4"]
    places: Int[np.ndarray, "patches 3"]
    levels: list[str]
    grid: LensGrid
