"""Lens grids as one self-contained HTML file: layer × token tables with a lens switch; a click shows a cell's neighbors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_latentlens.views.colors import color_range
from tl_latentlens.views.data import TokenReading
from tl_latentlens.views.grids import LensGrid
from tl_latentlens.views.jumps import JUMP_SENTENCE, is_jump
from tl_latentlens.views.known import KNOWN_LEVEL
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.strip import STRIP_NOTE, strip_lines
from tl_latentlens.views.template import render_template
from tl_latentlens.views.text import also_at, hook_headings, short_hook_name, visible

_CONTEXT_WIDTH = 160  # In columns.


def lens_page(grids: Sequence[LensGrid], head: PageHead) -> str:
    """The page of all texts of a run, of which there is at least one."""
    data = grid_data(grids)
    texts = [{"batch": grid.batch, **text} for grid, text in zip(grids, data["texts"], strict=True)]
    return render_template("page.html", {**data, "texts": texts}, head)


def grid_data(grids: Sequence[LensGrid]) -> dict[str, Any]:
    """The data that the scripts of a page show: the cells of some texts, with each context and token once."""
    first = grids[0]
    row_ids = np.unique(np.concatenate([grid.rows.ravel() for grid in grids])).tolist()
    contexts = first.contexts(row_ids, _CONTEXT_WIDTH)
    context_ids = {row: i for i, row in enumerate(contexts)}
    string_ids: dict[str, int] = {}
    texts = [_text_data(grid, context_ids, string_ids) for grid in grids]
    headings, kind = hook_headings(first.hook_names)
    return {
        "headings": headings,
        "kind": kind,
        "layers": list(map(short_hook_name, first.hook_names)),
        "hooks": list(map(short_hook_name, first.found_hook_names)),
        "unknown": KNOWN_LEVEL,
        "jump": JUMP_SENTENCE,
        "strip": STRIP_NOTE,
        "lenses": [_lens_scale(grids, lens) for lens in first.lenses],
        "contexts": [[c.before, c.token, c.after, c.lead, c.tail] for c in contexts.values()],
        "strings": list(string_ids),
        "texts": texts,
    }


def _text_data(grid: LensGrid, context_ids: dict[int, int], string_ids: dict[str, int]) -> dict[str, Any]:
    """The cells of one text; strings that are new are added to `string_ids`."""
    return {
        "tokens": grid.tokens,
        "positions": grid.positions,
        "latentlens": _neighbor_numbers(grid, context_ids),
        "also": _other_places(grid, string_ids),
        "jumps": _jump_ranks(grid),
        "known": _cell_numbers(grid.known),
        "use": _cell_numbers(grid.use_chances),
        "strips": _strips(grid.word_lists("words"), string_ids),
        **{lens: _word_numbers(grid.word_lists(lens), string_ids) for lens in ("words", "around") if lens in grid.lenses},
        **{
            lens: [_token_numbers(readings.get(name), string_ids) for name in grid.hook_names]
            for lens, readings in grid.readings.items()
        },
    }


def _lens_scale(grids: Sequence[LensGrid], lens: str) -> dict[str, Any]:
    score_name = grids[0].score_name(lens)
    low, high = color_range([grid.values(lens) for grid in grids], score_name)
    info = LENSES[lens]
    return {"key": lens, "name": info.label, "switch": info.switch, "scale": score_name, "low": low, "high": high}


def _other_places(grid: LensGrid, string_ids: dict[str, int]) -> list[list[list[int]]] | None:
    """[hook name][pos] → of each neighbor the string that says where else it was found; None where no row is listed once."""
    if grid.is_at is None:
        return None
    is_also = grid.is_at & (np.arange(grid.is_at.shape[-1]) != grid.hook_ids[..., None])
    patterns, of = np.unique(is_also.reshape(-1, is_also.shape[-1]), axis=0, return_inverse=True)
    names = np.array(grid.found_hook_names, object)
    notes = [string_ids.setdefault(also_at(["", *names[pattern]]), len(string_ids)) for pattern in patterns]
    return np.array(notes)[of].reshape(is_also.shape[:-1]).tolist()


def _jump_ranks(grid: LensGrid) -> list[list[list[int]]]:
    """[hook name][pos] → the ranks, from 0, after which the neighbors are much further."""
    return [[np.flatnonzero(ranks).tolist() for ranks in line] for line in is_jump(grid.similarities)]


def _strips(lists: list[list[list[str]]], string_ids: dict[str, int]) -> list[list[list[Any]]]:
    """[pos] → of each run of layers that read alike the first, the last, and the strings of its words; none without words."""
    strips = [strip_lines(of_layers) for of_layers in zip(*lists, strict=True)]
    return [[[line.first, line.last, *_word_numbers([[line.words]], string_ids)[0]] for line in lines] for lines in strips]


def _word_numbers(lists: list[list[list[str]]], string_ids: dict[str, int]) -> list[list[list[int]]]:
    """[hook name][pos] → the strings of the words."""
    return [[[string_ids.setdefault(word, len(string_ids)) for word in words] for words in line] for line in lists]


def _neighbor_numbers(grid: LensGrid, context_ids: dict[int, int]) -> list[list[list[float]]]:
    """[hook name][pos] → context, hook name and cosine of each neighbor, one after the other."""
    contexts = np.vectorize(context_ids.__getitem__, otypes=[np.int64])(grid.rows)
    cosines = grid.similarities.astype(np.float64).round(4)
    return _interleaved([contexts, grid.hook_ids, cosines])


def _cell_numbers(numbers: Float[np.ndarray, "names pos"] | None) -> list[list[float | None]] | None:
    """[hook name][pos] → a number, None where it is NaN; None where there are none."""
    if numbers is None or np.isnan(numbers).all():
        return None
    return [[None if np.isnan(number) else round(number, 4) for number in line] for line in numbers.tolist()]


def _token_numbers(reading: TokenReading | None, string_ids: dict[str, int]) -> list[list[float]] | None:
    """[pos] → string and score of each token, one after the other; new strings are added to `string_ids`."""
    if reading is None:
        return None
    ids = {
        token_id: string_ids.setdefault(visible(reading.strings[token_id]), len(string_ids))
        for token_id in np.unique(reading.token_ids).tolist()
    }
    strings = np.vectorize(ids.__getitem__, otypes=[np.int64])(reading.token_ids)
    return _interleaved([strings, reading.scores.astype(np.float64).round(4)])


def _interleaved(arrays: list[np.ndarray]) -> Any:
    """[..., k] arrays, interleaved along their last axis, as nested lists; whole numbers stay whole."""
    mixed = np.stack([array.astype(object) for array in arrays], -1)
    return mixed.reshape(*mixed.shape[:-2], -1).tolist()
