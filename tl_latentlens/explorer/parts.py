"""The parts of the page that show one reading, as Dash components: neighbors in context, other lenses, features."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.explorer.feature_labels import ShownLabel
from tl_latentlens.explorer.reader import DirectionReading
from tl_latentlens.explorer.web import html
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.chance import geometry_note, is_chance, nearness_sentence
from tl_latentlens.views.context import Context
from tl_latentlens.views.data import LensCell, NeighborLine, TokenScores
from tl_latentlens.views.jumps import JUMP_SENTENCE, is_jump
from tl_latentlens.views.known import format_share, is_unknown
from tl_latentlens.views.label_kinds import unbroken
from tl_latentlens.views.lens_names import LENSES, VOCABULARY_LENSES
from tl_latentlens.views.text import also_at, place_name, short_hook_name, visible
from tl_latentlens.vision.shown_image import ShownImage

_HEADING_WIDTH = 220  # characters of the text around a chosen token


def heading(result: LensResult, hook_name: str, pos: int) -> list[Any]:
    """The token that is read, marked in its text."""
    tokens = (result.tokens or [[]])[0]
    shown = result.positions[:, 1].tolist()
    before, after = ("".join(tokens[i] for i in shown if i != pos and (i < pos) is side) for side in (True, False))
    token = tokens[pos]
    context = Context.around(before, token, after).clipped(_HEADING_WIDTH)
    text = [html.Span(context.before), html.Mark(context.token), html.Span(context.after)]
    return [
        html.H2([html.Code(visible(token)), f" at {place_name(hook_name)}"], title=hook_name),
        html.P(text, className="text"),
    ]


def patch_heading(image: ShownImage, hook_name: str, pos: int) -> list[Any]:
    """The row, column and pixels of the patch that is read."""
    grid = image.grid
    token = grid.token(pos)
    row, column = int(grid.rows[token]) + 1, int(grid.columns[token]) + 1
    left, top, right, bottom = grid.boxes[token].round().astype(int).tolist()
    part = " of the whole image" if len(grid.shapes) > 1 and grid.levels[token] == 0 else ""
    return [
        html.H2(f"row {row}, column {column}{part} at {place_name(hook_name)}", title=hook_name),
        html.P(f"position {pos}, pixels {left}, {top} to {right}, {bottom}", className="note"),
    ]


def cell_parts(result: LensResult, hook_name: str, pos: int, lens: str, *, is_patch: bool = False) -> list[Any]:
    """The readings at one cell: its other words, words around, uses, and the other lenses; without `known` at an image's patch.

    Where the chosen lens did not read, a note says why.
    """
    cell = result.lens_cell(hook_name, pos)
    cell = replace(cell, known=None) if is_patch else cell
    is_faint = is_unknown(cell.known)
    words = _word_parts("nearest words" if is_patch else "other words", cell.words, is_faint=is_faint)
    around = _word_parts("words around", cell.around or None, is_faint=is_faint)
    uses = [html.H3("nearest uses"), neighbor_list(cell.neighbors, hook_name, is_faint=is_faint, marks_jumps=True)]
    lenses = [part for name in VOCABULARY_LENSES for part in _token_parts(name, cell.lenses.get(name), lens)]
    return [*_known_note(cell), *words, *around, *uses, *lenses]


def _word_parts(title: str, words: Sequence[str] | None, *, is_faint: bool) -> list[Any]:
    """Words under a heading; nothing where they were not read."""
    if words is None:
        return []
    chips = [html.Span(word) for word in words] or [html.Span("none", className="faint")]
    return [html.H3(title), html.Div(chips, className="chips faint" if is_faint else "chips")]


def _token_parts(lens: str, tokens: TokenScores | None, chosen: str) -> list[Any]:
    """Tokens of the vocabulary under the name of the lens that read them."""
    info = LENSES[lens]
    if tokens is None:
        return [html.P(f"The {info.label} reads the residual stream alone.", className="note")] if info.label == chosen else []
    chips = [html.Span([html.Code(visible(token)), f" {info.format_score(score)}"]) for token, score in tokens]
    return [html.H3(info.label), html.Div(chips, className="chips")]


def _known_note(cell: LensCell) -> list[Any]:
    """How well the bank knows the token, and whether its nearest row is the right use of it."""
    if cell.known is None:
        return []
    note = f"known {format_share(cell.known)}"
    if is_unknown(cell.known):
        note += ": the bank does not know this token"
    if cell.use_chance is not None:
        note += f" · as near to the first: {cell.use_chance:.0%} of the token's other uses"
    title = "the share of the bank's own tokens that are no nearer to their nearest neighbor"
    return [html.P(note, className="note", title=title)]


def ends(read: DirectionReading, lens: str) -> list[Any]:
    """Neighbors, whether they are near, and what the other lenses read, of both ends of a direction."""
    sections = []
    for i, (name, end) in enumerate(zip(("+v", "−v"), read.result.ends(0), strict=True)):
        readings = {name: reading.token_scores(i) for name, reading in read.lenses.items()}
        is_faint = end.nearness is not None and is_chance(end.nearness.p)
        note = [] if end.nearness is None else [html.P(nearness_sentence(end.nearness), className="note")]
        parts = _parts(lens, neighbor_list(end.neighbors, None, is_faint=is_faint), readings)
        sections.append(html.Section([html.H2(name), *note, *parts]))
    return sections


def direction_notes(result: DirectionResult) -> list[Any]:
    """How a direction was compared with the rows, and the nearest row of a random direction, for comparison."""
    notes = [f"v {geometry_note(result.transform)}"]
    if result.random is not None:
        end = result.random.ends(0)[0]
        near = end.neighbors[0]
        context = near.context.clipped(_HEADING_WIDTH)
        sentence = "" if end.nearness is None else f"; {nearness_sentence(end.nearness)}"
        text = f"{context.before}«{context.token}»{context.after}"
        notes.append(f"{result.random.ids[0]}: {near.similarity:.2f} {text}{sentence}")
    return [html.P(text, className="note") for text in notes]


def _parts(lens: str, neighbors: Any, readings: Mapping[str, TokenScores]) -> list[Any]:
    """The readings of a direction, the chosen lens first."""
    parts = {LENSES["latentlens"].label: [html.H3("nearest contexts"), neighbors]}
    parts |= {LENSES[name].label: _token_parts(name, tokens, lens) for name, tokens in readings.items()}
    return [component for label in sorted(parts, key=lambda label: label != lens) for component in parts[label]]


def neighbor_list(
    neighbors: Sequence[NeighborLine], hook_name: str | None, *, is_faint: bool = False, marks_jumps: bool = False
) -> Any:
    """A line a neighbor: similarity, the token marked in its context, where it stands.

    Args:
        neighbors: The neighbors.
        hook_name: The hook name that is read; it is not written again.
        is_faint: They are no reading.
        marks_jumps: Mark where the next is much further.
    """
    lines = []
    jumps = is_jump(np.array([near.similarity for near in neighbors])) & marks_jumps
    for near, is_last in zip(neighbors, jumps, strict=True):
        context, name = near.context.clipped(None), near.hook_name
        at = [] if name == hook_name else [html.Span(short_hook_name(name), className="hook", title=name)]
        where = html.Button(
            f"text {near.prompt_index:,}", id={"link": "text", "to": near.row}, className="link", title="read this text"
        )
        also = [html.Span(note)] if (note := also_at(near.hook_names)) else []
        text = [html.Span(context.before), html.Mark(context.token), html.Span(context.after)]
        lines.append(
            html.Li(
                [
                    html.Span(f"{near.similarity:.2f}", className="score"),
                    html.Div([*text, html.Div([*at, *also, where], className="where")], className="context"),
                ],
                className=" ".join(["faint"] * is_faint + ["jump"] * bool(is_last)),
                title=JUMP_SENTENCE if is_last else None,
            )
        )
    return html.Ol(lines, className="neighbors")


def feature_chips(
    active: Sequence[tuple[int, float]],
    hook_name: str | None,
    label_of: Callable[[int], ShownLabel] = lambda feature: ShownLabel(),
) -> list[Any]:
    """Features of the SAE that are active on a token, with their labels and activations; a click decodes one.

    A label that names something is strong, a mixed one faint.
    """
    if not active:
        return []
    chips = [
        html.Button([f"feature {i} ", *_label_parts(label_of(i)), html.Small(f"{value:.2f}")], id={"link": "feature", "to": i})
        for i, value in active
    ]
    title = f"SAE features active on this token, {place_name(hook_name or '')}"
    return [html.H3(title), html.Div(chips, className="chips")]


def _label_parts(label: ShownLabel) -> list[Any]:
    text = f"{unbroken(label.text)} "
    if not label.text:
        return []
    return [html.B(text)] if label.is_named else [html.Span(text, className="faint")]
