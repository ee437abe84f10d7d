"""A lens grid as layer × position heatmaps with hover (plotly)."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from tl_latentlens.views.colors import color_range
from tl_latentlens.views.context import Context
from tl_latentlens.views.grids import LensGrid
from tl_latentlens.views.jumps import is_jump
from tl_latentlens.views.known import format_share, is_unknown
from tl_latentlens.views.lens_names import CONTEXT_LENSES, LENSES, NO_WORD
from tl_latentlens.views.optional import plotly_graph_objects, plotly_subplots
from tl_latentlens.views.text import hook_headings, place_name, short_hook_name, visible

_MAX_CELLS_WITH_WORDS = 2500  # With more cells, or in a wider figure, words are shown in the hover only.
_MAX_PIXELS_WITH_WORDS = 9000
_MAX_HOVER_NEIGHBORS = 40_000  # In all hovers together.
_HOVER_CONTEXT_WIDTH = 80
_NEIGHBOR = "{:.3f}  {}  <i>{}</i>"
_JUMP = "<br>┄┄┄"
_FAINT = '<span style="fill-opacity:0.4">{}</span>'


@dataclass(frozen=True, eq=False)
class _Picture:
    """The words, values and colors of one lens in the cells; `words` is None where there are too many cells."""

    title: str
    values: Float[np.ndarray, "names pos"]
    words: list[list[str]] | None
    longest_word: int
    colorscale: list[list[Any]]
    low: float
    high: float
    score_name: str


def heatmap(grid: LensGrid, lens: str | None = None) -> Any:
    """A plotly figure with one heatmap, and buttons that switch it between the lenses that were read.

    Args:
        grid: What was read.
        lens: What is shown first; None: the first of the grid's lenses.

    Raises:
        MissingExtraError: plotly is not installed.
        InvalidInputError: The lens was not read.
    """
    graph_objects = plotly_graph_objects()
    lens = grid.lenses[0] if lens is None else lens
    grid.require_lens(lens)
    contexts = _hover_contexts(grid)
    hovers, pictures = _hovers(grid, contexts), _pictures(grid, contexts)
    figure = graph_objects.Figure(_trace(grid, pictures[lens], hovers))
    _lay_out(figure, grid, pictures.values(), n_panels=1).update_layout(title_text=pictures[lens].title)
    buttons = [
        {
            "label": LENSES[name].switch,
            "method": "update",
            "args": [{key: [value] for key, value in _restyled(picture).items()}, {"title.text": picture.title}],
        }
        for name, picture in pictures.items()
    ]
    if len(buttons) > 1:
        place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 8}}
        menu = {"type": "buttons", "direction": "right", "active": grid.lenses.index(lens), "buttons": buttons, **place}
        figure.update_layout(updatemenus=[menu], margin_t=104)
    return figure


def heatmaps(grid: LensGrid) -> Any:
    """A plotly figure with a heatmap for each lens that was read, one above the other, on one axis of positions.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    plotly_graph_objects()
    contexts = _hover_contexts(grid)
    pictures = _pictures(grid, contexts)
    n_panels, height = len(pictures), _panel_height(grid)
    titles = [picture.title for picture in pictures.values()]
    spacing = 44 / (n_panels * (height + 44))
    figure = plotly_subplots(n_panels, 1, shared_xaxes=True, vertical_spacing=spacing, subplot_titles=titles)
    for row, (lens, picture) in enumerate(pictures.items(), 1):
        # With very many cells the hovers of a panel tell of its own lens only.
        trace = _trace(grid, picture, _hovers(grid, contexts, tuple(LENSES) if picture.words else [lens]))
        low, high = next(figure.select_yaxes(row=row, col=1)).domain
        trace.update(colorbar={"y": (low + high) / 2, "len": high - low, "yanchor": "middle"})
        figure.add_trace(trace, row=row, col=1)
    figure.update_annotations(x=0, xanchor="left")
    return _lay_out(figure, grid, pictures.values(), n_panels=n_panels)


def plotly_text(text: str) -> str:
    """Text as plotly's markup shows it unchanged; it knows no &quot; and takes $…$ for TeX."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _n_hover_neighbors(grid: LensGrid) -> int:
    """Neighbors in a hover: fewer where there are many cells."""
    return max(1, min(grid.rows.shape[-1], _MAX_HOVER_NEIGHBORS // grid.n_cells))


def _hover_contexts(grid: LensGrid) -> dict[int, Context]:
    row_ids = np.unique(grid.rows[..., : _n_hover_neighbors(grid)]).tolist()
    return grid.contexts(row_ids, _HOVER_CONTEXT_WIDTH)


def _pictures(grid: LensGrid, contexts: dict[int, Context]) -> dict[str, _Picture]:
    """The picture of each lens."""
    _, kind = hook_headings(grid.hook_names)
    pictures = {}
    for lens in grid.lenses:
        words, longest_word = _neighbor_words(grid, contexts) if lens == "latentlens" else _token_words(grid, lens)
        info, values = LENSES[lens], grid.values(lens).astype(np.float64).round(4)
        low, high = color_range([values], grid.score_name(lens))
        pictures[lens] = _Picture(
            title=f"{info.title} at {kind}" if kind else info.title,
            values=values,
            words=words,
            longest_word=longest_word,
            colorscale=[[i / 2, color] for i, color in enumerate(info.colorscale)],
            low=low,
            high=high,
            score_name=grid.score_name(lens),
        )
    if _has_words(grid, pictures.values()):
        return pictures
    note = f"({len(grid.hook_names)} × {len(grid.positions):,} cells: words are in the hover only)"
    return {lens: replace(picture, words=None, title=f"{picture.title} {note}") for lens, picture in pictures.items()}


def _neighbor_words(grid: LensGrid, contexts: dict[int, Context]) -> tuple[list[list[str]], int]:
    """The word of the nearest neighbor in each cell, faint where the bank lacks the token, and the length of the longest."""
    nearest = grid.rows[..., 0]
    words = {row: _word(context) for row, context in contexts.items()}
    lines = [
        [_FAINT.format(words[row]) if is_faint else words[row] for row, is_faint in zip(row_ids, faint, strict=True)]
        for row_ids, faint in zip(nearest.tolist(), grid.is_unknown.tolist(), strict=True)
    ]
    shown = [contexts[row] for row in np.unique(nearest).tolist()]
    return lines, max(len(context.lead + context.token + context.tail) for context in shown)


def _token_words(grid: LensGrid, lens: str) -> tuple[list[list[str]], int]:
    """The first word or token of a lens in each cell, and the length of the longest.

    Words are faint where the bank lacks the token.
    """
    tokens, is_context = grid.first_tokens(lens), lens in CONTEXT_LENSES
    lines = [
        [
            _FAINT.format(plotly_text(token)) if is_context and (is_faint or token == NO_WORD) else plotly_text(token)
            for token, is_faint in zip(line, faint, strict=True)
        ]
        for line, faint in zip(tokens, grid.is_unknown.tolist(), strict=True)
    ]
    return lines, max(len(token) for line in tokens for token in line)


def _word(context: Context) -> str:
    """The word that a token belongs to; where the token is a part of it, the token in bold."""
    token = plotly_text(context.token)
    is_whole = not context.lead and not context.tail
    return token if is_whole else f"{plotly_text(context.lead)}<b>{token}</b>{plotly_text(context.tail)}"


def _trace(grid: LensGrid, picture: _Picture, hovers: list[list[str]]) -> Any:
    headings, _ = hook_headings(grid.hook_names)
    labels = [f"{pos}: {plotly_text(token)}" for pos, token in zip(grid.positions, grid.tokens, strict=True)]
    return plotly_graph_objects().Heatmap(
        z=picture.values,
        x=labels,
        y=headings,
        text=picture.words,
        texttemplate="%{text}" if picture.words else None,
        textfont={"size": 11, "color": "#111"},
        customdata=hovers,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=picture.colorscale,
        zmin=picture.low,
        zmax=picture.high,
        colorbar={"title": {"text": picture.score_name}, "thickness": 12},
        xgap=1 if picture.words else 0,
        ygap=1 if picture.words else 0,
    )


def _restyled(picture: _Picture) -> dict[str, Any]:
    """The properties of the heatmap that a button changes, with their new values."""
    values = [[None if np.isnan(value) else value for value in line] for line in picture.values.tolist()]
    words = {"text": picture.words} if picture.words else {}
    scale = {"zmin": picture.low, "zmax": picture.high, "colorbar.title.text": picture.score_name}
    return {"z": values, "colorscale": picture.colorscale, **words, **scale}


def _lay_out(figure: Any, grid: LensGrid, pictures: Iterable[_Picture], n_panels: int) -> Any:
    width = min(1600, max(700, 200 + 8 * len(grid.positions)))
    if _has_words(grid, pictures):
        width = _width_with_words(grid, pictures)
    layers = "layer" if hook_headings(grid.hook_names)[1] else "hook"
    figure.update_xaxes(type="category", tickangle=-45, showgrid=False)
    figure.update_yaxes(type="category", title_text=layers, showgrid=False)
    last_panel = n_panels if n_panels > 1 else None
    figure.update_xaxes(title_text="position: token", row=last_panel, col=1 if n_panels > 1 else None)
    return figure.update_layout(
        width=width,
        height=150 + n_panels * (_panel_height(grid) + 44),
        hoverlabel={"align": "left"},
        margin={"t": 70, "r": 20},
        title={"x": 0, "xref": "paper"},
    )


def _has_words(grid: LensGrid, pictures: Iterable[_Picture]) -> bool:
    return grid.n_cells <= _MAX_CELLS_WITH_WORDS and _width_with_words(grid, pictures) <= _MAX_PIXELS_WITH_WORDS


def _width_with_words(grid: LensGrid, pictures: Iterable[_Picture]) -> int:
    longest = max(picture.longest_word for picture in pictures)
    return max(620, 190 + max(36, 7 * longest + 8) * len(grid.positions))


def _panel_height(grid: LensGrid) -> int:
    return max(160, (30 if grid.n_cells <= _MAX_CELLS_WITH_WORDS else 14) * len(grid.hook_names))


def _hovers(grid: LensGrid, contexts: dict[int, Context], lenses: Sequence[str] = tuple(LENSES)) -> list[list[str]]:
    """For each cell, of the lenses that are named: its words, its neighbors in context, and the tokens of the vocabulary."""
    k = _n_hover_neighbors(grid) if "latentlens" in lenses else 0
    texts = {row: f"{plotly_text(c.before)}<b>{plotly_text(c.token)}</b>{plotly_text(c.after)}" for row, c in contexts.items()}
    found_names = [plotly_text(short_hook_name(name)) for name in grid.found_hook_names]
    word_lines = {lens: grid.word_lists(lens) for lens in ("words", "around") if lens in grid.lenses and lens in lenses}
    lens_lines = {lens: _lens_lines(grid, lens, _n_hover_neighbors(grid)) for lens in grid.readings if lens in lenses}
    jumps = is_jump(grid.similarities)[..., :k].tolist()
    hovers = []
    for i, hook_name in enumerate(grid.hook_names):
        heading = f" at {plotly_text(place_name(hook_name))}"
        row_ids, hook_ids, cosines = (array[i, :, :k].tolist() for array in (grid.rows, grid.hook_ids, grid.similarities))
        line = []
        for j, token in enumerate(grid.tokens):
            faint = _FAINT if grid.is_unknown[i, j] else "{}"
            words = [
                faint.format(f"{LENSES[lens].label}: {plotly_text(', '.join(lists[i][j])) or NO_WORD}")
                for lens, lists in word_lines.items()
            ]
            neighbors = zip(row_ids[j], hook_ids[j], cosines[j], jumps[i][j], strict=True)
            shown = [
                faint.format(_NEIGHBOR.format(cosine, texts[row], found_names[hook])) + _JUMP * is_last
                for row, hook, cosine, is_last in neighbors
            ]
            read = [lines[hook_name][j] for lines in lens_lines.values() if hook_name in lines]
            known = _known_line(grid, i, j) if k else []
            line.append("<br>".join([f"<b>{plotly_text(token)}</b>{heading}", *known, *words, *shown, *read]))
        hovers.append(line)
    return hovers


def _known_line(grid: LensGrid, i: int, j: int) -> list[str]:
    """How well the bank knows a token, and how near its other uses are, in a line; none where it was not computed."""
    if grid.known is None or np.isnan(grid.known[i, j]):
        return []
    known = f"known {plotly_text(format_share(grid.known[i, j].item()))}"
    if is_unknown(grid.known[i, j]):
        known += ": the bank does not know this token"
    use = np.nan if grid.use_chances is None else grid.use_chances[i, j].item()
    return [known if np.isnan(use) else f"{known} · as near to the first: {use:.0%} of the token's other uses"]


def _lens_lines(grid: LensGrid, lens: str, k: int) -> dict[str, list[str]]:
    """Hook name → for each position the first k tokens that a lens reads, in a line."""
    info, lines = LENSES[lens], {}
    for name, reading in grid.readings[lens].items():
        tokens = {token_id: plotly_text(visible(text)) for token_id, text in reading.strings.items()}
        lines[name] = [
            f"{info.label}: " + ", ".join(f"{tokens[i]} {info.format_score(s)}" for i, s in zip(ids, scores, strict=True))
            for ids, scores in zip(reading.token_ids[:, :k].tolist(), reading.scores[:, :k].tolist(), strict=True)
        ]
    return lines
