"""One text of a lens result as arrays over hook names and positions, for `heatmap`, `page` and `html`; rows looked up once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.result import LensResult, TokenReading
from tl_latentlens.views.text import CHANCE, clip, visible, word_around

_WORD = 76  # characters that a word and its neighbors are looked for in
LENSES = {"latentlens": "LatentLens", "logit_lens": "logit lens", "embedding_lens": "embedding lens"}


@dataclass(frozen=True)
class Context:
    """A row of the index in its text, all parts `printable`; lead and tail complete its token to a word."""

    before: str
    token: str
    after: str
    lead: str
    tail: str


@dataclass(frozen=True)
class Sheet:
    """One text: arrays are [hook name, pos, k] over the decoded positions, best first.

    Attributes:
        hook_names: The decoded hook names, in forward order.
        positions: The decoded positions.
        tokens: The input token at each, `visible`.
        index: Where the rows stand.
        rows, hook_ids, similarities: The neighbors.
        chances: How likely a random activation comes as near; None where it was not asked for.
        readings: Lens → hook name → vocabulary tokens at each position; a lens that was not read is left out.
    """

    hook_names: tuple[str, ...]
    positions: list[int]
    tokens: list[str]
    index: ContextualIndex
    rows: Int[np.ndarray, "names pos k"]
    hook_ids: Int[np.ndarray, "names pos k"]
    similarities: Float[np.ndarray, "names pos k"]
    chances: Float[np.ndarray, "names pos k"] | None
    readings: dict[str, dict[str, TokenReading]]

    @property
    def n_cells(self) -> int:
        """Hook names times positions."""
        return len(self.hook_names) * len(self.positions)

    @property
    def lenses(self) -> list[str]:
        """The lenses that were read, LatentLens first."""
        return ["latentlens", *self.readings]

    def scale(self, lens: str) -> str:
        """What `values` are."""
        if lens == "latentlens":
            return "cosine" if self.chances is None else "−log₁₀ p"
        return "probability" if lens == "logit_lens" else "cosine"

    @cached_property
    def faint(self) -> np.ndarray:
        """True where chance explains that the nearest neighbor is near, [hook name, pos]."""
        return np.zeros(self.rows.shape[:2], bool) if self.chances is None else self.chances[..., 0] >= CHANCE

    def values(self, lens: str) -> Float[np.ndarray, "names pos"]:
        """Of the nearest neighbor its cosine (or -log10 of its chance), of another lens the first token's score; else NaN."""
        if lens == "latentlens":
            return self.similarities[..., 0] if self.chances is None else -np.log10(self.chances[..., 0])
        missing = np.full(len(self.positions), np.nan)
        readings = self.readings[lens]
        return np.stack([readings[name].scores[:, 0] if name in readings else missing for name in self.hook_names])

    def best(self, lens: str) -> list[list[str]]:
        """The first token of a lens other than LatentLens at each hook name and position, `visible`."""
        return [
            [visible(reading.strings[i]) for i in reading.token_ids[:, 0].tolist()] if reading else [""] * len(self.positions)
            for reading in map(self.readings[lens].get, self.hook_names)
        ]


def columns_of(sheet: Sheet, places: Int[np.ndarray, " n"]) -> Sheet:
    """Some of a sheet's positions, counted among those that were decoded."""
    readings = {
        lens: {name: TokenReading(one.token_ids[places], one.scores[places], one.strings) for name, one in read.items()}
        for lens, read in sheet.readings.items()
    }
    return replace(
        sheet,
        positions=[sheet.positions[i] for i in places],
        tokens=[sheet.tokens[i] for i in places],
        rows=sheet.rows[:, places],
        hook_ids=sheet.hook_ids[:, places],
        similarities=sheet.similarities[:, places],
        chances=None if sheet.chances is None else sheet.chances[:, places],
        readings=readings,
    )


def sheet_of(result: LensResult, batch: int) -> Sheet:
    """The cells of one text.

    Raises:
        InvalidInputError: Nothing was decoded of it.
    """
    here = np.flatnonzero(result.positions[:, 0] == batch)
    if not len(here):
        texts = np.unique(result.positions[:, 0]).tolist()
        raise InvalidInputError(f"nothing was decoded of batch {batch}; decoded: {texts}")
    positions = result.positions[here, 1].tolist()
    found = [result.found[name][here] for name in result.hook_names]
    k = min(one.rows.shape[-1] for one in found)  # an index of several widths may hold fewer rows of one

    def stacked(part: str) -> np.ndarray:
        return np.stack([getattr(one, part)[:, :k].cpu().numpy() for one in found])

    readings = {lens: getattr(result, lens) for lens in ("logit_lens", "embedding_lens")}
    return Sheet(
        hook_names=result.hook_names,
        positions=positions,
        tokens=["?" if result.tokens is None else visible(result.tokens[batch][pos]) for pos in positions],
        index=found[0].index,
        rows=stacked("rows"),
        hook_ids=stacked("hook_ids"),
        similarities=stacked("similarities"),
        chances=None if any(one.chances is None for one in found) else stacked("chances"),
        readings={
            lens: {name: TokenReading(one.token_ids[here], one.scores[here], one.strings) for name, one in read.items()}
            for lens, read in readings.items()
            if read
        },
    )


def require_lens(sheet: Sheet, lens: str) -> None:
    """Check that a lens was read.

    Raises:
        InvalidInputError: It was not, or there is none of that name.
    """
    if lens not in sheet.lenses:
        raise InvalidInputError(
            f"got lens={lens!r}; this result has {sheet.lenses}: latentlens_hooks(index, logit_lens=True, embedding_lens=True)"
        )


def contexts_of(index: ContextualIndex, rows: Iterable[int], width: int) -> dict[int, Context]:
    """Rows in their texts, at most `width` characters, each looked up once."""
    contexts = {}
    for row in set(rows):
        found = index.row(row)
        before, token, after = clip(found.context(width), found.token, width)
        contexts[row] = Context(before, token, after, *word_around(before, token, after))
    return contexts


def whole_words(index: ContextualIndex, rows: Iterable[int]) -> dict[int, str]:
    """The word that each row's token belongs to, in the case it was written in."""
    contexts = contexts_of(index, rows, _WORD)
    return {row: one.lead + one.token.strip() + one.tail for row, one in contexts.items()}


def span(values: Sequence[Float[np.ndarray, "..."]], scale: str) -> tuple[float, float]:
    """The ends of a color scale: probabilities and -log10 of chances start at 0, cosines at the least one shown."""
    flat = np.concatenate([np.ravel(part) for part in values])
    finite = flat[np.isfinite(flat)]
    if scale == "probability" or not len(finite):
        return 0.0, 1.0
    low, high = (0.0 if scale != "cosine" else float(finite.min())), float(finite.max())
    return low, high if high > low else low + 1e-3
