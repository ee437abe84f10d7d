"""A lens result as layer × position heatmaps with hover (plotly)."""

import html
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.sheet import LENSES, Context, Sheet, contexts_of, require_lens, sheet_of, span
from tl_latentlens.views.text import CHANCE, hook_headings, short_hook_name, visible

_WORDS = 2500  # cells; with more, or in a figure wider than _WIDEST pixels, words are left to the hover
_WIDEST = 9000
_LINES = 40_000  # of neighbors in all hovers together
_CONTEXT = 80  # characters in a hover
_FAINT = '<span style="fill-opacity:0.4">{}</span>'
_TITLES = {
    "latentlens": "LatentLens: the nearest contextual token",
    "logit_lens": "Logit lens: the likeliest next token",
    "embedding_lens": "Embedding lens: the nearest input token",
}
_COLORS = {  # light enough that dark words can be read on all of them
    "latentlens": ("#f7fbff", "#9ecae1", "#4292c6"),
    "logit_lens": ("#fff5eb", "#fdbe85", "#f16913"),
    "embedding_lens": ("#f7fcf5", "#a1d99b", "#41ab5d"),
}


def heatmap(result: LensResult, batch: int = 0, lens: str = "latentlens") -> go.Figure:
    """One heatmap, and buttons that switch it between the lenses that were read."""
    sheet = sheet_of(result, batch)
    require_lens(sheet, lens)
    contexts = _contexts(sheet)
    hovers, pictures = _hovers(sheet, contexts), _pictures(sheet, contexts)
    figure = go.Figure(_trace(sheet, pictures[lens], hovers))
    _lay_out(figure, sheet, pictures.values(), panels=1).update_layout(title_text=pictures[lens]["title"])
    buttons = [
        {
            "label": LENSES[name],
            "method": "update",
            "args": [{key: [value] for key, value in _restyled(picture).items()}, {"title.text": picture["title"]}],
        }
        for name, picture in pictures.items()
    ]
    if len(buttons) > 1:
        place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 8}}
        menu = {"type": "buttons", "direction": "right", "active": sheet.lenses.index(lens), "buttons": buttons, **place}
        figure.update_layout(updatemenus=[menu], margin_t=104)
    return figure


def heatmaps(result: LensResult, batch: int = 0) -> go.Figure:
    """A heatmap for each lens that was read, one above the other, on one axis of positions."""
    sheet = sheet_of(result, batch)
    contexts = _contexts(sheet)
    pictures = _pictures(sheet, contexts)
    n = len(pictures)
    height = _height(sheet)
    titles = [picture["title"] for picture in pictures.values()]
    figure = make_subplots(n, 1, shared_xaxes=True, vertical_spacing=44 / (n * (height + 44)), subplot_titles=titles)
    for row, (lens, picture) in enumerate(pictures.items(), 1):
        shown = tuple(LENSES) if picture["words"] else [lens]  # with very many cells a panel's hovers tell of its own lens
        trace = _trace(sheet, picture, _hovers(sheet, contexts, shown))
        low, high = next(figure.select_yaxes(row=row, col=1)).domain
        trace.update(colorbar={"y": (low + high) / 2, "len": high - low, "yanchor": "middle"})
        figure.add_trace(trace, row=row, col=1)
    figure.update_annotations(x=0, xanchor="left")
    return _lay_out(figure, sheet, pictures.values(), panels=n)


def _lines(sheet: Sheet) -> int:
    """Neighbors in a hover: fewer where there are many cells."""
    return max(1, min(sheet.rows.shape[-1], _LINES // sheet.n_cells))


def _contexts(sheet: Sheet) -> dict[int, Context]:
    return contexts_of(sheet.index, np.unique(sheet.rows[..., : _lines(sheet)]).tolist(), _CONTEXT)


def _pictures(sheet: Sheet, contexts: dict[int, Context]) -> dict[str, dict[str, Any]]:
    """For each lens its title, values, words and colors."""
    nearest = {row: _word(context) for row, context in contexts.items()}
    _, kind = hook_headings(sheet.hook_names)
    pictures = {}
    for lens in sheet.lenses:
        if lens == "latentlens":
            pairs = zip(sheet.rows[..., 0].tolist(), sheet.faint.tolist(), strict=True)
            words = [[_FAINT.format(nearest[r]) if f else nearest[r] for r, f in zip(*p, strict=True)] for p in pairs]
            longest = max(
                len(c.lead + c.token + c.tail) for c in map(contexts.get, np.unique(sheet.rows[..., 0]).tolist()) if c
            )
        else:
            best = sheet.best(lens)
            words, longest = [list(map(plain, line)) for line in best], max(len(word) for line in best for word in line)
        values = sheet.values(lens).astype(np.float64).round(4)
        low, high = span([values], sheet.scale(lens))
        pictures[lens] = {
            "title": f"{_TITLES[lens]} at {kind}" if kind else _TITLES[lens],
            "z": values,
            "words": words,
            "longest": longest,
            "colors": [[i / 2, color] for i, color in enumerate(_COLORS[lens])],
            "low": low,
            "high": high,
            "scale": sheet.scale(lens),
        }
    if not _with_words(sheet, pictures.values()):
        cells = f"{len(sheet.hook_names)} × {len(sheet.positions):,} cells: words are in the hover only"
        pictures = {
            lens: picture | {"words": None, "title": f"{picture['title']} ({cells})"} for lens, picture in pictures.items()
        }
    return pictures


def _trace(sheet: Sheet, picture: dict[str, Any], hovers: list[list[str]]) -> go.Heatmap:
    headings, _ = hook_headings(sheet.hook_names)
    labels = [f"{pos}: {plain(token)}" for pos, token in zip(sheet.positions, sheet.tokens, strict=True)]
    return go.Heatmap(
        z=picture["z"],
        x=labels,
        y=headings,
        text=picture["words"],
        texttemplate="%{text}" if picture["words"] else None,
        textfont={"size": 11, "color": "#111"},
        customdata=hovers,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        colorscale=picture["colors"],
        zmin=picture["low"],
        zmax=picture["high"],
        colorbar={"title": {"text": picture["scale"]}, "thickness": 12},
        xgap=1 if picture["words"] else 0,
        ygap=1 if picture["words"] else 0,
    )


def _restyled(picture: dict[str, Any]) -> dict[str, Any]:
    values = [[None if np.isnan(value) else value for value in line] for line in picture["z"].tolist()]
    words = {"text": picture["words"]} if picture["words"] else {}
    ends = {"zmin": picture["low"], "zmax": picture["high"], "colorbar.title.text": picture["scale"]}
    return {"z": values, "colorscale": picture["colors"], **words, **ends}


def _lay_out(figure: go.Figure, sheet: Sheet, pictures: Iterable[dict[str, Any]], panels: int) -> go.Figure:
    width = _width(sheet, pictures) if _with_words(sheet, pictures) else min(1600, max(700, 200 + 8 * len(sheet.positions)))
    figure.update_xaxes(type="category", tickangle=-45, showgrid=False)
    figure.update_yaxes(type="category", title_text="layer" if hook_headings(sheet.hook_names)[1] else "hook", showgrid=False)
    figure.update_xaxes(title_text="position: token", row=panels if panels > 1 else None, col=1 if panels > 1 else None)
    return figure.update_layout(
        width=width,
        height=150 + panels * (_height(sheet) + 44),
        hoverlabel={"align": "left"},
        margin={"t": 70, "r": 20},
        title={"x": 0, "xref": "paper"},
    )


def _with_words(sheet: Sheet, pictures: Iterable[dict[str, Any]]) -> bool:
    return sheet.n_cells <= _WORDS and _width(sheet, pictures) <= _WIDEST


def _width(sheet: Sheet, pictures: Iterable[dict[str, Any]]) -> int:
    longest = max(picture["longest"] for picture in pictures)
    return max(620, 190 + max(36, 7 * longest + 8) * len(sheet.positions))


def _height(sheet: Sheet) -> int:
    return max(160, (30 if sheet.n_cells <= _WORDS else 14) * len(sheet.hook_names))


def _hovers(sheet: Sheet, contexts: dict[int, Context], shown: Sequence[str] = tuple(LENSES)) -> list[list[str]]:
    """For each cell its neighbors in context, and the tokens of the lenses that are shown."""
    k = _lines(sheet) if "latentlens" in shown else 0
    texts = {row: f"{plain(c.before)}<b>{plain(c.token)}</b>{plain(c.after)}" for row, c in contexts.items()}
    names = [plain(short_hook_name(name)) for name in sheet.index.hook_names]
    lenses = {lens: _lens_lines(sheet, lens, _lines(sheet)) for lens in sheet.readings if lens in shown}
    hovers = []
    for i, hook_name in enumerate(sheet.hook_names):
        heading = f" at {plain(short_hook_name(hook_name))}"
        rows, hooks, cosines = (part[i, :, :k].tolist() for part in (sheet.rows, sheet.hook_ids, sheet.similarities))
        forms = [["{:.3f}  {}  <i>{}</i>"] * k] * len(rows)
        if sheet.chances is not None:
            forms = [[_with_chance(chance) for chance in line] for line in sheet.chances[i, :, :k].tolist()]
        line = []
        for j, token in enumerate(sheet.tokens):
            found = zip(rows[j], hooks[j], cosines[j], forms[j], strict=True)
            near = [form.format(cosine, texts[row], names[hook]) for row, hook, cosine, form in found]
            read = [lines[hook_name][j] for lines in lenses.values() if hook_name in lines]
            line.append("<br>".join([f"<b>{plain(token)}</b>{heading}", *near, *read]))
        hovers.append(line)
    return hovers


@lru_cache
def _with_chance(chance: float) -> str:
    form = f"{{:.3f}} (p {chance:.2g})  {{}}  <i>{{}}</i>"
    return _FAINT.format(form) if chance >= CHANCE else form


def _lens_lines(sheet: Sheet, lens: str, k: int) -> dict[str, list[str]]:
    lines = {}
    for name, reading in sheet.readings[lens].items():
        tokens = {i: plain(visible(text)) for i, text in reading.strings.items()}
        pairs = zip(reading.token_ids[:, :k].tolist(), reading.scores[:, :k].tolist(), strict=True)
        form = "{} {:.0%}" if lens == "logit_lens" else "{} {:.2f}"
        read = [", ".join(form.format(tokens[i], score) for i, score in zip(*pair, strict=True)) for pair in pairs]
        lines[name] = [f"{LENSES[lens]}: {one}" for one in read]
    return lines


def _word(context: Context) -> str:
    """The word that a token is of; where it is a part of one, the token in bold."""
    token = plain(context.token)
    whole = not context.lead and not context.tail
    return token if whole else f"{plain(context.lead)}<b>{token}</b>{plain(context.tail)}"


def plain(text: str) -> str:
    """Text as plotly's markup shows it unchanged; it knows no &quot; and takes $…$ for TeX."""
    return html.escape(text, quote=False).replace("$", "&#36;")
