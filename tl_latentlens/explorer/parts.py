"""What the explore page shows of one reading, as Dash components: neighbors in context, the other lenses, features."""

from collections.abc import Mapping, Sequence
from typing import Any

from tl_latentlens.explorer.components import html
from tl_latentlens.explorer.image import Seen
from tl_latentlens.explorer.reader import DirectionReading
from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.lens.result import LensResult, TokenReading
from tl_latentlens.views.text import CHANCE, clip, short_hook_name, visible

_TEXT = 220  # characters of the text around a chosen token


def heading(result: LensResult, hook_name: str, pos: int) -> list[Any]:
    """The token that is read, marked in its text."""
    tokens = (result.tokens or [[]])[0]
    shown = result.positions[:, 1].tolist()
    before, after = ("".join(tokens[i] for i in shown if i != pos and (i < pos) is side) for side in (True, False))
    token = tokens[pos]
    lead = " " if token.startswith(" ") and token.strip() else ""
    before, marked, after = clip(f"{before}{lead}«{token.strip() or token}»{after}", token, _TEXT)
    text = [html.Span(before), html.Mark(marked), html.Span(after)]
    return [
        html.H2([html.Code(visible(token)), f" at {short_hook_name(hook_name)}"], title=hook_name),
        html.P(text, className="text"),
    ]


def patch_heading(seen: Seen, hook_name: str, pos: int) -> list[Any]:
    """Which patch is read, and where it is on the image."""
    token = seen.grid.token(pos)
    row, column = int(seen.grid.rows[token]) + 1, int(seen.grid.columns[token]) + 1
    left, top, right, bottom = seen.grid.boxes[token].round().astype(int).tolist()
    part = " of the whole image" if len(seen.grid.shapes) > 1 and seen.grid.levels[token] == 0 else ""
    return [
        html.H2(f"row {row}, column {column}{part} at {short_hook_name(hook_name)}", title=hook_name),
        html.P(f"position {pos}, pixels {left}, {top} to {right}, {bottom}", className="note"),
    ]


def cell_parts(result: LensResult, hook_name: str, pos: int, lens: str) -> list[Any]:
    """What each lens reads at one cell, the chosen one first."""
    cell = result.cell(hook_name, pos)
    i = result.positions[:, 1].tolist().index(pos)
    found = result.found[hook_name][i]
    chances = found.index.chances(found).tolist()
    readings = {"logit lens": result.logit_lens.get(hook_name), "embedding lens": result.embedding_lens.get(hook_name)}
    return _parts(lens, neighbor_list(cell.neighbors, hook_name, chances), readings, i)


def ends(read: DirectionReading, lens: str) -> list[Any]:
    """Neighbors, and what the other lenses read, of both ends of a direction."""
    found = [read.result.positive, read.result.negative]
    shown = []
    for i, (name, neighbors) in enumerate(zip(("+v", "−v"), read.result.neighbors(0), strict=True)):
        listed = neighbor_list(neighbors, None, found[i].index.chances(found[i])[0].tolist())
        shown.append(html.Section([html.H2(name), *_parts(lens, listed, read.lenses, i)]))
    return shown


def _parts(lens: str, neighbors: Any, readings: Mapping[str, TokenReading | None], row: int) -> list[Any]:
    parts = {"LatentLens": [html.H3("nearest contexts"), neighbors]}
    for name, reading in readings.items():
        if reading is not None:
            pairs = zip(reading.tokens(row), reading.scores[row].tolist(), strict=True)
            chips = [html.Span([html.Code(visible(token)), f" {_score(name, score)}"]) for token, score in pairs]
            parts[name] = [html.H3(name), html.Div(chips, className="chips")]
        elif name == lens:
            parts[name] = [html.P(f"The {name} reads the residual stream alone.", className="note")]
    return [one for name in sorted(parts, key=lambda name: name != lens) for one in parts[name]]


def _score(lens: str, score: float) -> str:
    return f"{score:.0%}" if lens == "logit lens" else f"{score:.2f}"


def neighbor_list(neighbors: Sequence[Neighbor], hook_name: str | None, chances: Sequence[float]) -> Any:
    """A line a neighbor: similarity, the token marked in its context, where it stands; dim where chance explains it."""
    lines = []
    for n, chance in zip(neighbors, chances, strict=True):
        before, token, after = clip(n.context, n.token, 2 * len(n.context))
        at = [] if n.hook_name == hook_name else [html.Span(short_hook_name(n.hook_name), className="hook", title=n.hook_name)]
        where = html.Button(
            f"text {n.prompt_index:,}", id={"link": "text", "to": n.row}, className="link", title="read this text"
        )
        p = f"p {chance:.0e}" if chance < CHANCE else f"p {chance:.2f}"
        lines.append(
            html.Li(
                [
                    html.Span(f"{n.similarity:.2f}", className="score", title=f"a random activation comes as near: {p}"),
                    html.Div(
                        [html.Span(before), html.Mark(token), html.Span(after), html.Div([*at, where, p], className="where")],
                        className="context",
                    ),
                ],
                className="chance" if chance >= CHANCE else "",
            )
        )
    return html.Ol(lines, className="neighbors")


def feature_chips(active: Sequence[tuple[int, float]], hook_name: str | None) -> list[Any]:
    """Features of the SAE that are active on a token; a click decodes one."""
    if not active:
        return []
    chips = [html.Button([f"feature {i} ", html.Small(f"{value:.2f}")], id={"link": "feature", "to": i}) for i, value in active]
    title = f"SAE features active on this token, {short_hook_name(hook_name or '')}"
    return [html.H3(title), html.Div(chips, className="chips")]
