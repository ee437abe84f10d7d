"""What a notebook shows of a result: small tables, escaped, in the notebook's own colors, light or dark."""

import html
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tl_latentlens.directions.direction_result import DirectionResult
from tl_latentlens.directions.feature_result import FeatureResult
from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.lens.followed import COLUMNS, FollowedTokens
from tl_latentlens.lens.result import Cell, LensResult
from tl_latentlens.views.sheet import LENSES, Context, Sheet, contexts_of, sheet_of, span
from tl_latentlens.views.text import CHANCE, clip, hook_headings, printable, short_hook_name, visible

if TYPE_CHECKING:
    from tl_latentlens.bank.bank import Bank
    from tl_latentlens.index.contextual import ContextualIndex, SearchResult

_WIDTH = 90  # characters of a context
_NEIGHBORS = 3
_CELLS = 1500  # of layer × token tables
_LINES = 60  # of other tables
_EXAMPLES = 4
_CELL = "text-align: left; vertical-align: top; padding: 0.2em 0.6em; color: inherit; background: transparent"
_HUE = "66 133 244"


def lens_html(result: LensResult) -> str:
    """A layer × token table for each text, colored by similarity, and below it the neighbors of the first tokens in context."""
    grids, note, left = [], "", _CELLS
    for batch in np.unique(result.positions[:, 0]).tolist():
        sheet = sheet_of(result, batch)
        left -= sheet.n_cells
        if left < 0:
            note = _note("More texts or tokens than a notebook shows well: use to_html(path), plot() or to_dataframe().")
            break
        grids.append(_grid(sheet))
    lines = [_line(cell) for cell in islice(_by_token(result), _LINES)]
    n_cells = len(result.hook_names) * len(result.positions)
    cut = f", {_LINES} of {n_cells:,}" if n_cells > _LINES else ""
    table = _table(list(dict.fromkeys(heading for line in lines for heading in line)), lines)
    few = "" if grids and n_cells > 12 else " open"
    return f"{''.join(grids)}{note}<details{few}><summary>neighbors in context{cut}</summary>{table}</details>"


def followed_html(followed: FollowedTokens) -> str:
    """Chosen tokens at the last decoded position of each text: a line a layer, scores and ranks by each lens."""
    batches = np.unique(followed.result.positions[:, 0]).tolist()
    cut = f"the first {_EXAMPLES} of {len(batches)} texts; to_dataframe() has all"
    tables = [_followed(followed, batch) for batch in batches[:_EXAMPLES]]
    return "".join([*tables, _note(cut) if len(batches) > _EXAMPLES else ""])


def _followed(followed: FollowedTokens, batch: int) -> str:
    frame, lines = followed.at(batch=batch), []
    headings, kind = hook_headings(followed.result.hook_names)
    for heading, (_, layer) in reversed(list(zip(headings, frame.groupby("hook_name", sort=False), strict=True))):
        line = {"layer" if kind else "hook": _text(heading)}
        for token, read in zip(followed.tokens, layer.to_dict("records"), strict=True):
            name = f"<code style='background: none; color: inherit'>{_text(visible(token))}</code>"
            line |= {
                f"{name}<br>{LENSES[lens]}": _standing(lens, *(read[c] for c in COLUMNS[lens])) for lens in followed.lenses
            }
        lines.append(line)
    pos, token = frame[["pos", "token"]].iloc[0]
    note = f"text {batch}, position {pos}: {visible(token)}{f', {kind}' if kind else ''}; ranks are small"
    return _table(list(lines[0]) if lines else [], lines) + _note(note)


def _standing(lens: str, score: float, rank: Any) -> str:
    if np.isnan(score):
        return ""
    shown = f"{score:.2f}" if lens == "embedding_lens" else f"{score:.0%}" if score >= 0.005 or not score else "&lt; 1%"
    return shown if pd.isna(rank) else f"{shown} <small>{rank:,}</small>"


def index_html(index: "ContextualIndex") -> str:
    """Model, rows, hook names, transform and device."""
    lines = {
        "model": index.model_info.name,
        "rows": f"{index.n_rows:,} of {len(index.banks)} bank{'s' * (len(index.banks) > 1)}",
        "hook names": _names(index.hook_names, index.d),
        "transform": index.transform,
        "device": str(index.device),
    }
    return _facts("ContextualIndex", lines)


def bank_html(bank: "Bank") -> str:
    """Model, rows, hook names, plan, and a few rows in context."""
    model, plan = bank.model_info, bank.plan
    cap = plan.settings.max_rows_per_token
    rows = dict.fromkeys(((2 * np.arange(_EXAMPLES) + 1) * bank.n_rows // (2 * _EXAMPLES)).tolist())
    lines = {
        "model": f"{model.name}, {model.n_layers} layers, d_model {model.d_model}",
        "rows": f"{bank.n_rows:,} contextual tokens of {plan.n_prompts:,} prompts",
        "plan": f"{'no cap' if cap is None else f'at most {cap} rows'} a token id, seed {plan.settings.seed}"
        + ", each text run twice" * plan.settings.repeat,
        "hook names": _names(bank.hook_names, bank.d),
        "stored as": f"{bank.dtype}, {bank.path.stat().st_size / 1e6:,.1f} MB, {bank.path}",
    }
    examples = (bank.row(row) for row in rows)
    contexts = "<br>".join(_marked(*clip(row.context(), row.token, _WIDTH)) for row in examples)
    return _facts("Bank", lines, {"examples": contexts})


def directions_html(result: DirectionResult) -> str:
    """The nearest rows to each direction and to its opposite."""
    lines = []
    for i, name in enumerate(islice(result.ids, _LINES)):
        positive, negative = result.neighbors(i)
        near = {"nearest to +v": _neighbors(positive), "nearest to −v": _neighbors(negative)}
        lines.append({"direction": _text(name), **near})
    return _headed(f"{len(result.ids):,} directions", lines, len(result.ids))


def features_html(result: FeatureResult) -> str:
    """A line a feature: its label, or why it has none, its figures, and its nearest rows."""
    lines, place = [], {feature: i for i, feature in enumerate(result.ids)}
    figures = [name for name in ("density", "auroc_same_token", "similarity") if name in result.table]
    for line in result.table.head(_LINES).to_dict("records"):
        feature = line["feature"]
        label = (
            f"<b>{_text(line['label'])}</b>" if line["label"] else f"<span style='opacity: 0.6'>{_text(line['why_not'])}</span>"
        )
        read = {name.replace("_", " "): "" if np.isnan(line[name]) else f"{line[name]:.3g}" for name in figures}
        near = _neighbors(result.positive.neighbors_of(place[feature])) if feature in place else ""
        lines.append({"feature": str(feature), "label, or why not": label, **read, "nearest rows": near})
    labelled = np.count_nonzero(result.table["label"] != "")
    return _headed(f"{len(result.table):,} features, {labelled:,} labelled", lines, len(result.table))


def search_html(found: "SearchResult") -> str:
    """The nearest rows to each query."""
    n = int(np.prod(found.rows.shape[:-1]))
    places = (", ".join(map(str, place)) for place in np.ndindex(*found.rows.shape[:-1]))
    lines = [
        {"query": place, "nearest rows": _neighbors(found.neighbors_of(i))} for i, place in enumerate(islice(places, _LINES))
    ]
    return _headed(f"{n:,} quer{'y' if n == 1 else 'ies'}", lines, n)


def _grid(sheet: Sheet) -> str:
    """Layers upwards, tokens to the right, the nearest neighbor's word in each cell."""
    contexts = contexts_of(sheet.index, np.unique(sheet.rows[..., 0]).tolist(), _WIDTH)
    values = sheet.values("latentlens")
    low, high = span([values], sheet.scale("latentlens"))
    headings, kind = hook_headings(sheet.hook_names)
    shares = (0.55 * np.clip((values - low) / (high - low), 0, 1)).round(2).tolist()
    lines = []
    for i in reversed(range(len(headings))):
        cells = zip(sheet.rows[i, :, 0].tolist(), shares[i], sheet.similarities[i, :, 0].tolist(), sheet.faint[i], strict=True)
        words = (_word(contexts[row], share, cosine, faint) for row, share, cosine, faint in cells)
        lines.append(f"<tr><th style='{_CELL}; text-align: right'>{_text(headings[i])}</th>{''.join(words)}</tr>")
    foot = "".join(f"<th style='{_CELL}; white-space: pre; font-weight: normal'>{_text(token)}</th>" for token in sheet.tokens)
    corner = f"<th style='{_CELL}; font-weight: normal; opacity: 0.65'>{'layer' if kind else 'hook'}</th>"
    scale = (
        f"nearest contextual token{f' at {kind}' if kind else ''}; color: {sheet.scale('latentlens')} {low:.2f} to {high:.2f}"
    )
    return _scrolled("".join([*lines, f"<tr>{corner}{foot}</tr>"])) + _note(scale)


def _word(context: Context, share: float, cosine: float, faint: bool) -> str:
    token = _text(context.token)
    word = f"{_text(context.lead)}<b>{token}</b>{_text(context.tail)}" if context.lead or context.tail else token
    tip = f"{cosine:.3f}  {context.before}«{context.token}»{context.after}"
    word = f"<span style='opacity: 0.45'>{word}</span>" if faint else word
    style = f"{_CELL}; white-space: pre; background: rgb({_HUE} / {share})"
    return f"<td style='{style}' title='{html.escape(tip)}'>{word}</td>"


def _by_token(result: LensResult) -> Iterable[Cell]:
    return (result._cell(name, i) for i in range(len(result.positions)) for name in result.hook_names)


def _line(cell: Cell) -> dict[str, str]:
    line = {
        "pos": f"{cell.batch}, {cell.pos}",
        "token": f"<code style='background: none; color: inherit'>{_text(visible(cell.token))}</code>",
        "hook": _text(short_hook_name(cell.hook_name)),
        "nearest contextual tokens": _neighbors(cell.neighbors),
    }
    for heading, reading in (("logit lens", cell.logit_lens), ("embedding lens", cell.embedding_lens)):
        if reading:
            line[heading] = "<br>".join(f"{score:.2f} {_text(visible(token))}" for token, score in reading[:_NEIGHBORS])
    return line


def _neighbors(neighbors: Sequence[Neighbor]) -> str:
    lines = "<br>".join(_neighbor(one) for one in neighbors[:_NEIGHBORS])
    return f"<div style='min-width: 18em'>{lines}</div>"  # a narrow page scrolls rather than stack single words


def _neighbor(neighbor: Neighbor) -> str:
    shown = f"{neighbor.similarity:.2f} {_marked(*clip(neighbor.context, neighbor.token, _WIDTH))}"
    faint = neighbor.chance is not None and neighbor.chance >= CHANCE
    return f"<span style='opacity: 0.45'>{shown}</span>" if faint else shown


def _marked(before: str, token: str, after: str) -> str:
    around = "<span style='opacity: 0.65'>{}</span>"
    return f"{around.format(_text(before))}<b>{_text(token)}</b>{around.format(_text(after))}"


def _names(names: Sequence[str], width: Any) -> str:
    shown = [f"{name} [{width(name)}]" for name in names[:_LINES]]
    return ", ".join([*shown, f"and {len(names) - _LINES:,} more"] if len(names) > _LINES else shown)


def _facts(heading: str, lines: dict[str, str], ready: dict[str, str] | None = None) -> str:
    """A table of names and what they are; those of `ready` are HTML already."""
    shown = {name: _text(text) for name, text in lines.items()} | (ready or {})
    body = "".join(
        f"<tr><th style='{_CELL}; opacity: 0.65; white-space: nowrap'>{name}</th><td style='{_CELL}'>{text}</td></tr>"
        for name, text in shown.items()
    )
    return f"<b>{heading}</b>{_scrolled(body)}"


def _headed(heading: str, lines: list[dict[str, str]], n: int) -> str:
    cut = _note(f"the first {len(lines)} of {n:,}; to_dataframe() has all") if n > len(lines) else ""
    return f"<b>{heading}</b>{_table(list(lines[0]) if lines else [], lines)}{cut}"


def _table(headings: Sequence[str], lines: Sequence[dict[str, str]]) -> str:
    """Lines of HTML by heading, in a table that scrolls where it is too wide or too long."""
    head = "".join(f"<th style='{_CELL}; opacity: 0.65'>{heading}</th>" for heading in headings)
    rows = ("".join(f"<td style='{_CELL}'>{line.get(heading, '')}</td>" for heading in headings) for line in lines)
    return _scrolled(f"<tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}")


def _scrolled(rows: str) -> str:
    style = "border-collapse: collapse; margin: 0.3em 0; color: inherit; border: 1px solid rgb(128 128 128 / 0.4)"
    return f"<div style='overflow: auto; max-height: 40em'><table style='{style}'>{rows}</table></div>"


def _note(text: str) -> str:
    return f"<div style='opacity: 0.65; font-size: 0.85em'>{_text(text)}</div>"


def _text(text: object) -> str:
    return html.escape(printable(str(text)))
