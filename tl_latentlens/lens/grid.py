"""The cells of one text of a lens result as arrays, as views draw them."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.index.word_search import WordSearchResult
from tl_latentlens.lens.cell import numbers_of_cells, words_of_cells
from tl_latentlens.views.data import TokenReading
from tl_latentlens.views.grids import LensGrid


def text_grid(
    found: Mapping[str, SearchResult],
    words: Mapping[str, WordSearchResult],
    around: Mapping[str, list[list[str]]],
    readings: Mapping[str, dict[str, TokenReading]],
    cell_ids: Int[np.ndarray, " cells"],
    *,
    batch: int,
    positions: list[int],
    tokens: list[str],
) -> LensGrid:
    """The grid of some cells.

    Args:
        found: Hook name → neighbors, in forward order.
        words: Hook name → nearest other words; empty where they were not asked for.
        around: Hook name → words around the nearest uses, like `words`.
        readings: Lens → hook name → what the lens reads.
        cell_ids: The cells, counted as in all of these.
        batch: Their text.
        positions: The position of each cell.
        tokens: The input token of each, `visible`.
    """
    searches = [search[cell_ids] for search in found.values()]
    index = searches[0].index
    k = min(search.rows.shape[-1] for search in searches)  # An index of several widths may hold fewer rows of one.

    def stacked(field_name: str) -> np.ndarray:
        return np.stack([getattr(search, field_name)[:, :k].cpu().numpy() for search in searches])

    return LensGrid(
        batch=batch,
        hook_names=tuple(found),
        positions=positions,
        tokens=tokens,
        found_hook_names=index.hook_names,
        contexts=index.contexts,
        rows=stacked("rows"),
        hook_ids=stacked("hook_ids"),
        similarities=stacked("similarities"),
        known=numbers_of_cells([search.known for search in searches], len(cell_ids)),
        use_chances=numbers_of_cells([search.use_chances for search in searches], len(cell_ids)),
        readings={
            lens: {name: reading.select(cell_ids) for name, reading in by_name.items()}
            for lens, by_name in readings.items()
            if by_name
        },
        words=words_of_cells(list(found), cell_ids, {name: result.texts_of for name, result in words.items()}),
        around=words_of_cells(list(found), cell_ids, {name: lists.__getitem__ for name, lists in around.items()}),
        is_at=stacked("is_at") if all(search.is_at is not None for search in searches) else None,
    )
