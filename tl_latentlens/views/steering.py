"""Steered runs as one self-contained HTML file: layers by multiples of the vector; a click shows what a cell reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from tl_latentlens.views.data import TokenReading
from tl_latentlens.views.grids import LensGrid
from tl_latentlens.views.page import grid_data
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.template import render_template
from tl_latentlens.views.text import printable

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, eq=False)
class SteeredText:
    """One token of a text under each multiple of a vector.

    Attributes:
        label: The token in its text.
        multiples: The multiples.
        grids: What was read under each, at the one token.
        cosines: Cosine of each activation with the unsteered one, [hook name, multiple]; NaN where it is not known.
    """

    label: str
    multiples: Sequence[float]
    grids: Sequence[LensGrid] = field(repr=False)
    cosines: Float[np.ndarray, "names multiples"] = field(repr=False)


def steering_page(texts: Sequence[SteeredText], head: PageHead) -> str:
    """The page of all texts, of which there is at least one."""
    data = grid_data([_side_by_side(text) for text in texts])
    for text, shown in zip(texts, data["texts"], strict=True):
        shown["label"] = printable(text.label)
        shown["notes"] = [[_cosine_note(cosine) for cosine in line] for line in text.cosines.tolist()]
    return render_template("page.html", data, head, title="tl-latentlens: steering")


def multiple_heading(multiple: float) -> str:
    """The heading of a column: "unsteered", "+2 v", "−1 v"."""
    if not multiple:
        return "unsteered"
    return f"{_MINUS if multiple < 0 else '+'}{abs(multiple):g} v"


def _cosine_note(cosine: float) -> str:
    return "" if np.isnan(cosine) else f"cosine with the unsteered activation {cosine:.2f}"


def _side_by_side(text: SteeredText) -> LensGrid:
    """The grids of one token under several multiples as one, whose columns are the multiples."""
    grids, first = text.grids, text.grids[0]
    k = min(grid.rows.shape[-1] for grid in grids)

    def arrays(name: str) -> np.ndarray | None:
        parts = [getattr(grid, name) for grid in grids]
        return None if any(part is None for part in parts) else np.concatenate(parts, 1)

    def neighbors(name: str) -> np.ndarray:
        return np.concatenate([getattr(grid, name)[:, :, :k] for grid in grids], 1)

    def words(name: str) -> list[list[list[str]]] | None:
        parts = [getattr(grid, name) for grid in grids]
        if any(part is None for part in parts):
            return None
        return [[cell for line in lines for cell in line] for lines in zip(*parts, strict=True)]

    return LensGrid(
        batch=first.batch,
        hook_names=first.hook_names,
        positions=list(range(len(grids))),
        tokens=list(map(multiple_heading, text.multiples)),
        found_hook_names=first.found_hook_names,
        contexts=first.contexts,
        rows=neighbors("rows"),
        hook_ids=neighbors("hook_ids"),
        similarities=neighbors("similarities"),
        known=arrays("known"),
        use_chances=arrays("use_chances"),
        readings={lens: _readings(grids, lens) for lens in first.readings if all(lens in grid.readings for grid in grids)},
        words=words("words"),
        around=words("around"),
        is_at=None if any(grid.is_at is None for grid in grids) else neighbors("is_at"),
    )


def _readings(grids: Sequence[LensGrid], lens: str) -> dict[str, TokenReading]:
    """Hook name → the tokens that a lens reads in all grids, one after the other."""
    of_grids = [grid.readings[lens] for grid in grids]
    names = [name for name in of_grids[0] if all(name in readings for readings in of_grids)]
    joined = {}
    for name in names:
        parts = [readings[name] for readings in of_grids]
        strings = {token_id: text for part in parts for token_id, text in part.strings.items()}
        joined[name] = TokenReading(
            np.concatenate([part.token_ids for part in parts]), np.concatenate([part.scores for part in parts]), strings
        )
    return joined
