"""An evaluation as tables for the terminal."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tl_latentlens.views.data import MeasurePanel
from tl_latentlens.views.measures import GEOMETRIC, figure_text, gain_text, hook_names_of, measure_lines
from tl_latentlens.views.terminal.features import summary_table
from tl_latentlens.views.terminal.layout import longest_width, terminal_width, titled
from tl_latentlens.views.text import hook_headings

_PADDINGS = {3: (0, 1), 2: (0, 0, 0, 1), 1: (0, 0)}  # Characters between columns, and rich's padding for them.
_EDGES = 4  # Characters that the left and the right edge of a table take at most.


def evaluation_tables(
    panels: Sequence[MeasurePanel],
    transforms: Sequence[str],
    gains: pd.DataFrame | None,
    labels: pd.DataFrame | None,
    width: int | None = None,
) -> Group:
    """Tables for each measure, readers by hook names; then what each transform gains over the first; then label scores.

    Args:
        panels: The measures.
        transforms: The transforms that were compared.
        gains: What the other transforms gain: measure, reader, gain, low, high, kind; None where there is one transform.
        labels: Label scores of an SAE, a block of lines for each transform; None without an SAE.
        width: In characters; None: the terminal's.
    """
    parts = [_measure_tables(panel, transforms, terminal_width(width)) for panel in panels]
    if gains is not None:
        title = f"gain over {transforms[0]}, hook names together: above 0 better, * where sure at 95 %"
        parts.append(titled(title, _gains_table(gains)))
    if labels is not None:
        for transform, summary in labels.groupby("transform", sort=False):
            parts.append(titled(f"labels of SAE features, {transform}", summary_table(summary)))
    return Group(*parts)


def _measure_tables(panel: MeasurePanel, transforms: Sequence[str], width: int) -> Group:
    """Title and means, in parts only where the hook names do not fit side by side, however near the columns stand."""
    lines, hook_names = panel.table, hook_names_of(panel)
    headings, kind = hook_headings(hook_names)
    title = Text(f"{panel.name}{f', {kind}' if kind else ''}: ", "bold")
    note = f"{'lower' if panel.lower_is_better else 'higher'} is better, {lines['n'].max():,} {panel.unit}"
    note = f"{panel.kind}, {note}" if panel.kind == GEOMETRIC else note
    title.append("" if title.cell_len + len(note) <= width else "\n").append(note)
    reader_width, mean_width = (
        longest_width("reader", *lines["reader"]),
        longest_width(*(_mean(mean, panel.kind) for mean in lines["mean"])),
    )
    column_width = max(mean_width, longest_width(*headings))

    def n_parts(margin: int) -> int:
        free = width - reader_width - mean_width - margin - _EDGES
        return math.ceil(len(hook_names) / max(1, free // (column_width + margin)))

    margin = min(_PADDINGS, key=lambda margin: (n_parts(margin), -margin))
    parts = np.array_split(hook_names, n_parts(margin))
    return Group(title, *(_measure_table(panel, names.tolist(), transforms, margin) for names in parts))


def _mean(value: float, kind: str) -> str:
    """A mean in five characters where it is below 100; geometric means have two digits from 0.001 on: 0.123, .0012, 1e-05."""
    text = figure_text(value, kind)
    return text.removeprefix("0") if len(text) > 5 and text.startswith("0.") else text


def _half_interval(lines: pd.DataFrame, kind: str) -> str:
    """The larger half of the interval, averaged over the lines: what stands after ±, or the factor that stands after ×÷."""
    mean, low, high = (lines[name].to_numpy(float) for name in ("mean", "low", "high"))
    if kind == GEOMETRIC:
        if not (is_above := low > 0).any():
            return ""
        mean, low, high = (np.log(ends[is_above]) for ends in (mean, low, high))
        return f"{np.exp(np.fmax(high - mean, mean - low).mean()):.2f}"
    half = float(np.fmax(high - mean, mean - low).mean())
    return "" if math.isnan(half) else f"{half:.3f}" if half < 10 else f"{half:.2f}"


def _measure_table(panel: MeasurePanel, hook_names: Sequence[str], transforms: Sequence[str], margin: int) -> Table:
    """Readers by hook names; the best transform at each hook name in bold."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=_PADDINGS[margin])
    table.add_column("reader", no_wrap=True)
    for heading in hook_headings(hook_names)[0]:
        table.add_column(heading, justify="right")
    table.add_column("×÷" if panel.kind == GEOMETRIC else "±", justify="right")
    for line in measure_lines(panel, transforms):
        figures = [line.figures.get(name) for name in hook_names]
        cells = [Text() if f is None else Text(_mean(f.mean, panel.kind), "bold" if f.is_best else "") for f in figures]
        half = _half_interval(pd.DataFrame(panel.table[panel.table["reader"] == line.reader]), panel.kind)
        table.add_row(Text(line.reader, "" if line.is_compared else "dim"), *cells, Text(half, "dim"))
    return table


def _gains_table(gains: pd.DataFrame) -> Table:
    """The gain of each transform, marked where its interval leaves 0 out."""
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=_PADDINGS[2])
    table.add_column("measure")
    for reader in dict.fromkeys(gains["reader"]):
        table.add_column(reader, justify="right", no_wrap=True)
    for measure, lines in gains.groupby("measure", sort=False):
        cells = []
        for gain, low, high, kind in zip(lines["gain"], lines["low"], lines["high"], lines["kind"], strict=True):
            is_sure = low > 0 or high < 0
            cells.append(Text(f"{gain_text(gain, kind)}{'*' if is_sure else ' '}", "bold" if is_sure else ""))
        table.add_row(str(measure), *cells)
    return table
