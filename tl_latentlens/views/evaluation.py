"""An evaluation as one self-contained HTML file: a chart of each measure, its table, and what transforms gain."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

from tl_latentlens.views.chart import ChartLine, line_chart
from tl_latentlens.views.data import MeasurePanel
from tl_latentlens.views.lens_names import LENSES
from tl_latentlens.views.measures import GEOMETRIC, Figure, MeasureLine, figure_text, gain_text, hook_names_of, measure_lines
from tl_latentlens.views.page_head import PageHead
from tl_latentlens.views.template import render_template
from tl_latentlens.views.text import hook_headings, place_name, printable

_N_COLORS = 6
_LENS_COLORS = {info.label: f"var(--{lens.replace('_', '-')})" for lens, info in LENSES.items()}
_LENS_COLORS["around"] = "var(--around)"
_NULL_COLOR = "var(--dim)"
_NO_FIGURE = Figure(math.nan, math.nan, math.nan)


def evaluation_page(
    panels: Sequence[MeasurePanel],
    transforms: Sequence[str],
    gains: pd.DataFrame | None,
    labels: pd.DataFrame | None,
    head: PageHead,
) -> str:
    """The page; the first four arguments are those of `evaluation_tables`."""
    parts = [_measure(panel, transforms) for panel in panels]
    if gains is not None:
        parts.append(_gains(gains, transforms[0]))
    if labels is not None:
        parts += [_labels(str(transform), summary) for transform, summary in labels.groupby("transform", sort=False)]
    return render_template("evaluation.html", {}, head, title="tl-latentlens: evaluation", body="\n".join(parts))


def _measure(panel: MeasurePanel, transforms: Sequence[str]) -> str:
    """Heading, best readers, chart, table, and what is measured."""
    hook_names, lines = hook_names_of(panel), measure_lines(panel, transforms)
    headings, kind = hook_headings(hook_names)
    better = "lower is better" if panel.lower_is_better else "higher is better"
    n_units = max(panel.table["n"].tolist())
    chart = line_chart(
        [_chart_line(line, transforms, hook_names, panel.kind) for line in lines],
        headings,
        title=f"{panel.name}, a line a reader; the table has its figures",
        axis="layer" if kind else "hook",
        is_log=panel.kind == GEOMETRIC,
    )
    scale = ", on a logarithmic scale" if panel.kind == GEOMETRIC else ""
    note = f"{panel.kind} over {n_units:,} {panel.unit}{scale}; {better}"
    about = ""
    if panel.about:
        about = f'<details class="about"><summary>What is measured</summary><p>{_text(panel.about)}</p></details>'
    return (
        f'<section class="measure"><h2>{_text(panel.name)}</h2><small>{_text(note)}</small>{about}'
        f'<p class="best">{_best(panel, lines)}</p>{chart}{_table(lines, hook_names, headings, panel.kind)}</section>'
    )


def _chart_line(line: MeasureLine, transforms: Sequence[str], hook_names: Sequence[str], kind: str) -> ChartLine:
    figures = [line.figures.get(name, _NO_FIGURE) for name in hook_names]
    tips = [
        f"{line.reader}, {place_name(name)}: {_with_interval(f, kind)}" for name, f in zip(hook_names, figures, strict=True)
    ]
    color = _LENS_COLORS.get(line.reader, _NULL_COLOR)
    if line.is_compared:
        color = f"var(--line-{list(transforms).index(line.reader) % _N_COLORS + 1})"
    columns = zip(*((f.mean, f.low, f.high) for f in figures), strict=True)
    means, lows, highs = map(list, columns) if figures else ([], [], [])
    is_null = color == _NULL_COLOR
    return ChartLine(line.reader, color, is_null, means, lows, highs, tips, line.needs_no_hook)


def _best(panel: MeasurePanel, lines: Sequence[MeasureLine]) -> str:
    """The hook at which a transform is furthest ahead of all other readers, with both figures; empty where there is none."""
    gaps = []
    for name in hook_names_of(panel):
        at = [(line, figure) for line in lines if (figure := line.figures.get(name)) and math.isfinite(figure.mean)]
        pairs = [
            _best_of([(line, f) for line, f in at if line.is_compared is is_compared], panel) for is_compared in (True, False)
        ]
        if pairs[0] and pairs[1] and math.isfinite(gap := _gap(pairs[0][1].mean, pairs[1][1].mean, panel)):
            gaps.append((gap, name, *pairs))
    if not gaps:
        return ""
    gap, name, (line, figure), (other, null) = max(gaps, key=lambda found: found[0])
    said = "Furthest ahead" if gap > 0 else "Nowhere ahead; nearest"
    return (
        f"{said} at {_text(place_name(name))}: {_text(line.reader)} <b>{_with_interval(figure, panel.kind)}</b>; "
        f"the best of the others there, {_text(other.reader)}, {_with_interval(null, panel.kind)}."
    )


def _best_of(found: list[tuple[MeasureLine, Figure]], panel: MeasurePanel) -> tuple[MeasureLine, Figure] | None:
    sign = 1 if panel.lower_is_better else -1
    return min(found, key=lambda pair: sign * pair[1].mean, default=None)


def _gap(mean: float, other: float, panel: MeasurePanel) -> float:
    """How far a mean is ahead of another: the difference, or the logarithm of the ratio; NaN for that of 0."""
    sign = -1 if panel.lower_is_better else 1
    if panel.kind == GEOMETRIC:
        return sign * math.log(mean / other) if mean > 0 and other > 0 else math.nan
    return sign * (mean - other)


def _table(lines: Sequence[MeasureLine], hook_names: Sequence[str], headings: Sequence[str], kind: str) -> str:
    """Readers by hook names: means, with their intervals below; the best transform at each hook name in bold."""
    head = "".join(
        f'<th scope="col" title="{_text(name)}">{_text(text)}</th>' for name, text in zip(hook_names, headings, strict=True)
    )
    rows = []
    for line in lines:
        cells = [_cell(line.figures.get(name, _NO_FIGURE), kind) for name in hook_names]
        faint, name = "" if line.is_compared else ' class="faint"', _text(line.reader)
        rows.append(f'<tr><th scope="row" title="{name}"{faint}>{name}</th>{"".join(cells)}</tr>')
    return _scrolling(f'<thead><tr><th scope="col">reader</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>')


def _cell(figure: Figure, kind: str) -> str:
    mean = figure_text(figure.mean, kind)
    has_interval = math.isfinite(figure.low) and math.isfinite(figure.high)
    interval = f"<small>{figure.low:.2g}–{figure.high:.2g}</small>" if has_interval else ""
    return f"<td>{f'<b>{mean}</b>' if figure.is_best else mean}{interval}</td>"


def _gains(gains: pd.DataFrame, over: str) -> str:
    """What each transform gains, in bold where its interval leaves 0 out."""
    readers = list(dict.fromkeys(gains["reader"]))
    rows = []
    for measure, lines in gains.groupby("measure", sort=False):
        cells = []
        for gain, low, high, kind in zip(lines["gain"], lines["low"], lines["high"], lines["kind"], strict=True):
            text, ends = gain_text(gain, kind), [gain_text(end, kind) for end in (low, high)]
            interval = f"<small>{ends[0]} to {ends[1]}</small>" if all(ends) else ""
            cells.append(f"<td>{f'<b>{text}</b>' if low > 0 or high < 0 else text}{interval}</td>")
        rows.append(f'<tr><th scope="row">{_text(str(measure))}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{_text(reader)}</th>' for reader in ["measure", *readers])
    about = (
        "Mean over the hooks, in pairs: the same senses and tokens. Above 0 the transform is better; in bold where the 95 % "
        "interval below leaves 0 out. The gain of a KL is relative."
    )
    table = _scrolling(f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>", "figures wrapped")
    return f'<section class="measure wide"><h2>gain over {_text(over)}</h2><p>{about}</p>{table}</section>'


def _labels(transform: str, summary: pd.DataFrame) -> str:
    """The scores of the labels of an SAE's features."""
    rows = []
    for line in summary.to_dict("records"):
        low, high, null = ("" if np.isnan(line[name]) else f"{line[name]:.3f}" for name in ("low", "high", "null"))
        cells = [f"{line['mean']:.3f}", f"{low}–{high}" if low else "", null, f"{line['features']:,}"]
        cells_html = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{_text(str(line["figure"]))}</th>{cells_html}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("figure", "mean", "95 %", "null", "features"))
    table = _scrolling(f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>", "figures wrapped")
    about = (
        "Means over the features that are active somewhere, beside those of wrong directions (null). labelled: the share whose "
        "scores beat these; the page of label-sae says what each score is."
    )
    return f'<section class="measure"><h2>labels of SAE features, {_text(transform)}</h2><p>{about}</p>{table}</section>'


def _scrolling(rows: str, kind: str = "figures") -> str:
    return f'<div class="scrolls"><table class="{kind}">{rows}</table></div>'


def _with_interval(figure: Figure, kind: str) -> str:
    mean, low, high = (figure_text(value, kind) for value in (figure.mean, figure.low, figure.high))
    return f"{mean} ({low} to {high})" if low and high else mean


def _text(text: str) -> str:
    return escape(printable(text))
