"""Results as HTML for a notebook: small tables, escaped, in the notebook's own colors, light or dark."""

import html
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from tl_latentlens.views.chance import geometry_note, is_chance, nearness_sentence
from tl_latentlens.views.colors import NOTEBOOK_HUE, color_range
from tl_latentlens.views.context import Context
from tl_latentlens.views.data import DirectionEnd, DirectionLine, FeatureLine, LensCell, NeighborLine, PropertyTable
from tl_latentlens.views.grids import FollowedGrid, LensGrid
from tl_latentlens.views.jumps import JUMP_SENTENCE, is_jump
from tl_latentlens.views.known import format_share, is_unknown
from tl_latentlens.views.label_kinds import N_WRITES, unbroken
from tl_latentlens.views.legend import legend_of
from tl_latentlens.views.lens_names import LENSES, NO_WORD
from tl_latentlens.views.strip import STRIP_NOTE, Strip
from tl_latentlens.views.text import also_at, hook_headings, layer_headings, printable, short_hook_name, visible

NOTEBOOK_NEIGHBORS = 3  # Neighbors of a cell or a line.
NOTEBOOK_EXAMPLES = 4  # Rows, or texts, that stand for all.
_CONTEXT_WIDTH = 90
_MAX_GRID_CELLS = 1500
_MAX_TABLE_LINES = 60
_CELL_STYLE = "text-align: left; vertical-align: top; padding: 0.2em 0.6em; color: inherit; background: transparent"


def lens_html(grids: Iterable[LensGrid], cells: Iterable[LensCell], n_cells: int) -> str:
    """A layer × token table for each text, and below it the words and neighbors in context of the first tokens.

    Args:
        grids: The texts; only as many are taken as are shown.
        cells: All cells, token by token; only as many are taken as are shown.
        n_cells: How many cells there are.
    """
    tables, note, n_left = [], "", _MAX_GRID_CELLS
    for grid in grids:
        n_left -= grid.n_cells
        if n_left < 0:
            note = _note("More texts or tokens than a notebook shows well: use to_html(path), plot() or to_dataframe().")
            break
        tables.append(_grid_table(grid))
    shown = list(islice(cells, _MAX_TABLE_LINES))
    has_around = any(cell.around for cell in shown)
    lines = [_cell_line(cell, has_around=has_around) for cell in shown]
    cut = f", {_MAX_TABLE_LINES} of {n_cells:,}" if n_cells > _MAX_TABLE_LINES else ""
    table = _table(list(dict.fromkeys(heading for line in lines for heading in line)), lines)
    is_open = "" if tables and n_cells > 12 else " open"
    title = f"<summary>words and uses in context{cut}</summary>"
    return f"{''.join(tables)}{note}<details{is_open}>{title}{table}{_note(_legend(lines))}</details>"


def _legend(lines: Sequence[dict[str, str]]) -> str:
    """What the columns of the table of cells show."""
    columns = dict.fromkeys(heading for line in lines for heading in line)
    return "; ".join(f"{name}: {text}" for name, text in legend_of(columns).items())


def strip_html(strip: Strip) -> str:
    """The other words of one token over all layers: a line for each run of layers that read alike."""
    heading = f"{layer_headings(strip.hook_names)[1]}s"
    lines = [
        {heading: _text(strip.label(line)), LENSES["words"].label: _words(line.words, is_faint=strip.is_faint(line))}
        for line in strip.lines
    ]
    context = strip.heading.context
    place = _text(strip.heading.label) if context is None else _marked(context.clipped(_CONTEXT_WIDTH))
    return f"<b>{_text(strip.summary())}</b><div>{place}</div>{_table(list(lines[0]), lines)}{_note(STRIP_NOTE)}"


def followed_html(grids: Sequence[FollowedGrid], n_texts: int) -> str:
    """Chosen tokens at one position of each text: a line a layer, scores and ranks by each lens.

    Args:
        grids: The texts that are shown.
        n_texts: How many texts there are.
    """
    cut = f"the first {len(grids)} of {n_texts} texts; to_dataframe() has all"
    return "".join([*map(_followed_table, grids), _note(cut) if n_texts > len(grids) else ""])


def properties_html(table: PropertyTable) -> str:
    """A table of names and texts, and a few rows in context."""
    shown = {name: _text(text if isinstance(text, str) else _joined(text)) for name, text in table.properties.items()}
    if table.examples:
        shown["examples"] = "<br>".join(_marked(context.clipped(_CONTEXT_WIDTH)) for context in table.examples)
    heading_style = f"{_CELL_STYLE}; opacity: 0.65; white-space: nowrap"
    body = "".join(
        f"<tr><th style='{heading_style}'>{name}</th><td style='{_CELL_STYLE}'>{text}</td></tr>" for name, text in shown.items()
    )
    return f"<b>{table.title}</b>{_scrolled(body)}"


def directions_html(
    directions: Iterable[DirectionLine], n_directions: int, transform: str, random: DirectionLine | None
) -> str:
    """The nearest rows to each direction and to its opposite.

    Args:
        directions: The directions.
        n_directions: How many there are.
        transform: How they were compared with the rows.
        random: A random direction, which stands last, for comparison; None: none.
    """
    title = f"{n_directions:,} direction{'s' * (n_directions != 1)}, {geometry_note(transform)}"
    lines = [_direction_line(line) for line in islice(directions, _MAX_TABLE_LINES)]
    return _titled_table(title, lines, n_directions, [] if random is None else [_direction_line(random)])


def features_html(features: Iterable[FeatureLine], n_features: int, n_labelled: int, transform: str) -> str:
    """A line a feature: its scores, its label, or why it has none, what it writes, and its nearest rows under a transform."""
    lines = []
    for line in islice(features, _MAX_TABLE_LINES):
        names = ("density", "detection") if "density" in line.scores else ("similarity",)
        scores = {name: "" if np.isnan(line.scores[name]) else f"{line.scores[name]:.3g}" for name in names}
        label = {"label, or why not": _feature_label(line), "writes": _text(", ".join(line.writes[:N_WRITES]))}
        neighbors = _neighbor_lines(line.neighbors) if line.neighbors else ""
        lines.append({"feature": str(line.feature), **scores, **label, "nearest rows": neighbors})
    title = f"{n_features:,} features, {n_labelled:,} labelled, {geometry_note(transform)}"
    return _titled_table(title, lines, n_features)


def _feature_label(line: FeatureLine) -> str:
    """A label that names something is strong, a mixed one faint, the reason against one fainter and slanted."""
    if line.is_named:
        return f"<b>{_text(unbroken(line.label))}</b>"
    style = "opacity: 0.7" if line.label else "opacity: 0.55; font-style: italic"
    return f"<span style='{style}'>{_text(unbroken(line.label) or line.why_not)}</span>"


def search_html(queries: Iterable[tuple[str, list[NeighborLine], float | None]], n_queries: int) -> str:
    """The nearest rows to each query, which is named by its place, and how well the bank knows it, where that is not None."""
    lines = [
        {
            "query": place,
            **({} if known is None else {"known": _text(format_share(known))}),
            "nearest rows": _neighbor_lines(neighbors, is_faint=is_unknown(known)),
        }
        for place, neighbors, known in islice(queries, _MAX_TABLE_LINES)
    ]
    return _titled_table(f"{n_queries:,} quer{'y' if n_queries == 1 else 'ies'}", lines, n_queries)


def _grid_table(grid: LensGrid) -> str:
    """Layers upwards, tokens to the right; in each cell the nearest other word, or the nearest neighbor's word."""
    lens = grid.lenses[0]
    contexts = grid.contexts(np.unique(grid.rows[..., 0]).tolist(), _CONTEXT_WIDTH)
    shown = grid.word_lists(lens) if lens == "words" else None
    values, score_name = grid.values(lens), grid.score_name(lens)
    low, high = color_range([values], score_name)
    shares = (0.55 * np.clip((values - low) / (high - low), 0, 1)).round(2).tolist()
    nearest, cosines = grid.rows[..., 0].tolist(), grid.similarities[..., 0].tolist()
    headings, kind = hook_headings(grid.hook_names)
    lines = []
    for i in reversed(range(len(headings))):
        words = shown[i] if shown is not None else [None] * len(grid.positions)
        cells = zip(nearest[i], words, shares[i], cosines[i], grid.is_unknown[i], strict=True)
        texts = (_word_cell(contexts[row], word, share, cosine, is_faint) for row, word, share, cosine, is_faint in cells)
        lines.append(f"<tr><th style='{_CELL_STYLE}; text-align: right'>{_text(headings[i])}</th>{''.join(texts)}</tr>")
    token_style = f"{_CELL_STYLE}; white-space: pre; font-weight: normal"
    tokens = "".join(f"<th style='{token_style}'>{_text(token)}</th>" for token in grid.tokens)
    corner = f"<th style='{_CELL_STYLE}; font-weight: normal; opacity: 0.65'>{'layer' if kind else 'hook'}</th>"
    what = "nearest other word" if shown is not None else "nearest contextual token"
    scale = f"{what}{f' at {kind}' if kind else ''}; color: {score_name} {low:.2f} to {high:.2f}"
    return _scrolled("".join([*lines, f"<tr>{corner}{tokens}</tr>"])) + _note(scale)


def _word_cell(context: Context, words: list[str] | None, share: float, cosine: float, is_faint: bool) -> str:
    """The first word, or "·"; where there are no lists of words, the word of the nearest neighbor. The tip has both."""
    tip = f"{cosine:.3f}  {context.before}«{context.token}»{context.after}"
    if words is None:
        token = _text(context.token)
        word = f"{_text(context.lead)}<b>{token}</b>{_text(context.tail)}" if context.lead or context.tail else token
    else:
        word = _text(words[0]) if words else f"<span style='opacity: 0.45'>{NO_WORD}</span>"
        tip = f"{', '.join(words)}\n{tip}" if words else tip
        is_faint = is_faint and bool(words)
    word = f"<span style='opacity: 0.45'>{word}</span>" if is_faint else word
    style = f"{_CELL_STYLE}; white-space: pre; background: rgb({NOTEBOOK_HUE} / {share})"
    return f"<td style='{style}' title='{html.escape(tip)}'>{word}</td>"


def _cell_line(cell: LensCell, *, has_around: bool) -> dict[str, str]:
    is_faint = is_unknown(cell.known)
    line = {
        "pos": f"{cell.batch}, {cell.pos}",
        "token": _code(visible(cell.token)),
        "hook": _text(short_hook_name(cell.hook_name)),
        **({} if cell.known is None else {"p": _text(format_share(cell.known))}),
        **({} if cell.words is None else {LENSES["words"].label: _words(cell.words, is_faint=is_faint)}),
        **({LENSES["around"].label: _words(cell.around or [], is_faint=is_faint)} if has_around else {}),
        "nearest uses": _neighbor_lines(cell.neighbors, is_faint=is_faint, marks_jumps=True),
    }
    for lens, tokens in cell.lenses.items():
        if tokens:
            shown = tokens[:NOTEBOOK_NEIGHBORS]
            line[LENSES[lens].label] = "<br>".join(f"{score:.2f} {_text(visible(token))}" for token, score in shown)
    return line


def _words(words: Sequence[str], *, is_faint: bool) -> str:
    shown = _text(", ".join(words)) or NO_WORD
    return f"<div style='min-width: 8em{'; opacity: 0.45' * (is_faint or not words)}'>{shown}</div>"


def _followed_table(grid: FollowedGrid) -> str:
    headings, kind = hook_headings(grid.hook_names)
    lines = []
    for i in reversed(range(len(headings))):
        line = {"layer" if kind else "hook": _text(headings[i])}
        for j, token in enumerate(grid.followed):
            for lens, scores in grid.scores.items():
                label = "nearest contexts" if lens == "contexts" else LENSES[lens].label
                heading = f"{_code(visible(token))}<br>{label}"
                line[heading] = _score_and_rank(lens, scores[i, j], grid.ranks[lens][i, j])
        lines.append(line)
    place = f"text {grid.batch}, position {grid.pos}: {visible(grid.token)}{f', {kind}' if kind else ''}"
    return _table(list(lines[0]) if lines else [], lines) + _note(f"{place}; ranks in small type")


def _score_and_rank(lens: str, score: float, rank: float) -> str:
    if np.isnan(score):
        return ""
    shown = f"{score:.2f}" if lens == "embedding_lens" else f"{score:.0%}" if score >= 0.005 or not score else "&lt; 1%"
    return shown if np.isnan(rank) else f"{shown} <small>{int(rank):,}</small>"


def _direction_line(line: DirectionLine) -> dict[str, str]:
    return {
        "direction": _text(line.name),
        "nearest to +v": _direction_end(line.positive),
        "nearest to −v": _direction_end(line.negative),
    }


def _direction_end(end: DirectionEnd) -> str:
    if end.nearness is None:
        return _neighbor_lines(end.neighbors)
    lines = _neighbor_lines(end.neighbors, is_faint=is_chance(end.nearness.p))
    return lines + _note(nearness_sentence(end.nearness))


def _neighbor_lines(neighbors: Sequence[NeighborLine], *, is_faint: bool = False, marks_jumps: bool = False) -> str:
    """Neighbors in context; a dashed line where the next is much further, if that is asked for."""
    shown = neighbors[:NOTEBOOK_NEIGHBORS]
    jumps = is_jump(np.array([near.similarity for near in shown])) if marks_jumps else [False] * len(shown)
    lines = []
    for near, is_last in zip(shown, jumps, strict=True):
        also = also_at(near.hook_names)
        note = f" <small style='opacity: 0.65'>{_text(also)}</small>" if also else ""
        mark = f"; border-bottom: 2px dashed rgb({NOTEBOOK_HUE} / 0.6)' title='{html.escape(JUMP_SENTENCE)}" if is_last else ""
        text = f"{near.similarity:.2f} {_marked(near.context.clipped(_CONTEXT_WIDTH))}{note}"
        lines.append(f"<div style='padding: 0.1em 0{mark}'>{text}</div>")
    style = "min-width: 18em" + "; opacity: 0.45" * is_faint
    return f"<div style='{style}'>{''.join(lines)}</div>"  # A narrow page scrolls rather than stack single words.


def _marked(context: Context) -> str:
    side = "<span style='opacity: 0.65'>{}</span>"
    return f"{side.format(_text(context.before))}<b>{_text(context.token)}</b>{side.format(_text(context.after))}"


def _joined(texts: Sequence[str]) -> str:
    n_more = len(texts) - _MAX_TABLE_LINES
    return ", ".join([*texts[:_MAX_TABLE_LINES], *([f"and {n_more:,} more"] if n_more > 0 else [])])


def _titled_table(title: str, lines: list[dict[str, str]], n_lines: int, last: Sequence[dict[str, str]] = ()) -> str:
    """A table of the first of so many lines, and of others that stand last in it and are not counted."""
    cut = _note(f"the first {len(lines)} of {n_lines:,}; to_dataframe() has all") if n_lines > len(lines) else ""
    return f"<b>{title}</b>{_table(list(lines[0]) if lines else [], [*lines, *last])}{cut}"


def _table(headings: Sequence[str], lines: Sequence[dict[str, str]]) -> str:
    """Lines of HTML by heading, in a table that scrolls where it is too wide or too long."""
    head = "".join(f"<th style='{_CELL_STYLE}; opacity: 0.65'>{heading}</th>" for heading in headings)
    rows = ("".join(f"<td style='{_CELL_STYLE}'>{line.get(heading, '')}</td>" for heading in headings) for line in lines)
    return _scrolled(f"<tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}")


def _scrolled(rows: str) -> str:
    style = "border-collapse: collapse; margin: 0.3em 0; color: inherit; border: 1px solid rgb(128 128 128 / 0.4)"
    return f"<div style='overflow: auto; max-height: 40em'><table style='{style}'>{rows}</table></div>"


def _note(text: str) -> str:
    return f"<div style='opacity: 0.65; font-size: 0.85em'>{_text(text)}</div>"


def _code(text: str) -> str:
    return f"<code style='background: none; color: inherit'>{_text(text)}</code>"


def _text(text: object) -> str:
    return html.escape(printable(str(text)))
